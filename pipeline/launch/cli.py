"""The verb `launch`."""

import logging
import os

from pipeline.errors import EXIT_OK
from pipeline.limits import available_cores


def main(argv: list[str]) -> int:
    """`pipeline launch`: the ranks of this node, as torchrun starts them; see docs/clusters.md."""
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torch's own lines, over the one that a worker has printed
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pipeline.launch.options import parse

    options = parse(argv)
    if "OMP_NUM_THREADS" not in os.environ and options.nproc > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // options.nproc))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    if options.warm and not options.serve_store:
        from pipeline.launch.workers import warm_up

        warm_up()
    from pipeline.launch.launcher import Launcher

    code = Launcher(options).run()
    return EXIT_OK if code == EXIT_OK else code
