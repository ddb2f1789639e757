"""`pipeline train` under NCCL's rule, on gloo: a process group is destroyed by all ranks together, or hangs.

`python -m tests.nccl_rule SECONDS train --config ...`: rank 0's report takes so many seconds, and a rank that leaves
earlier counts as hung after a third of them.
"""

import os
import sys
import time

import torch.distributed as dist

from pipeline.__main__ import main
from pipeline.training import recorder
from pipeline.training.ranks import world

if __name__ == "__main__":
    seconds = float(sys.argv[1])
    real = dist.destroy_process_group

    def write_report(*_):
        time.sleep(seconds)  # what a report of a large run takes

    def destroy():
        store, size = dist.distributed_c10d._get_default_store(), int(os.environ["WORLD_SIZE"])
        store.add("destroyed", 1)
        while store.add("destroyed", 0) < size:
            time.sleep(0.05)  # polls a condition
        real()

    recorder.write_report, dist.destroy_process_group = write_report, destroy
    world._LEAVE_S = seconds / 3
    sys.exit(main(sys.argv[2:]))
