"""The model of scaling (`pipeline estimate --scale`) against what two ranks on this machine's CPU do.

    python benchmarks/scaling_two_ranks.py DATA [--config cifar10-resnet18] [--local_batch 32] [--json FILE]

DATA: a data root. Measures the link (gloo's all-reduce over the loopback, alone), one rank's step and two ranks' step
(`pipeline bench train`, a core a rank), and prints the efficiency that the model predicts from the first two beside the
measured one. Both ranks' step without the exchange is there too: on a CPU they share caches and memory, which the model
knows nothing of, and the exchange itself takes the time of the cores that compute, where a GPU's does not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))


def measure_link(target: str, size_mb: float) -> None:
    """In each of two ranks: the median time of an all-reduce of 4 bytes and of `size_mb` MB into the file `target`."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    found = {}
    for name, count in (("latency_s", 1), ("bucket_s", int(size_mb * 2**18))):
        times = []
        for _ in range(40):
            values = torch.ones(count)
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - begun)
        found[name] = sorted(times)[len(times) // 2]
    if dist.get_rank() == 0:
        Path(target).write_text(json.dumps(found))
    dist.destroy_process_group()


def torchrun(*arguments: str, processes: int) -> None:
    """Start so many ranks on as many cores."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    own = os.environ | {"OMP_NUM_THREADS": "1"}
    pin = partial(os.sched_setaffinity, 0, cores)
    subprocess.run([*launch, *arguments], cwd=HOME, env=own, check=True, preexec_fn=pin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--config", default="cifar10-resnet18")
    parser.add_argument("--local_batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bucket_mb", type=float, default=25)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    import torch

    from pipeline.config import parse_config
    from pipeline.dataset.index.index import index_folder, open_index
    from pipeline.insight.bench.machine import describe_machine
    from pipeline.insight.estimate.scaling import Links, predict
    from pipeline.model.build import build_model, count_parameters

    with tempfile.TemporaryDirectory() as folder:
        link_file = Path(folder) / "link.json"
        torchrun(__file__, "--link", str(link_file), str(given.bucket_mb), processes=2)
        link = json.loads(link_file.read_text())
        results = {}
        for processes in (1, 2):
            target = Path(folder) / f"{processes}.json"
            arguments = ["-m", "pipeline", "bench", "train", "--config", given.config, "--data.root", str(given.data)]
            arguments += ["--train.global_batch_size", str(given.local_batch * processes), "--data.threads", "1"]
            arguments += ["--train.bucket_mb", str(int(given.bucket_mb)), "--rounds", str(given.rounds)]
            torchrun(*arguments, "--json", str(target), processes=processes)
            results[processes] = json.loads(target.read_text())["result"]
    config = parse_config(["--config", given.config])
    classes = open_index(index_folder(given.data)).num_classes
    with torch.device("meta"):
        gradient_bytes = 4 * count_parameters(build_model(config.model, classes))
    hop_s = link["latency_s"] / 2  # two hops there and back
    gb_s = given.bucket_mb * 2**20 / (link["bucket_s"] - link["latency_s"]) / 1e9
    links = Links(2, gb_s, gb_s, hop_s * 1e6)
    alone, both = (results[n]["seconds"] for n in (1, 2))
    predicted = predict(2, alone["compute"]["median"], gradient_bytes, links, given.bucket_mb * 2**20)
    measured = alone["compute"]["median"] / both["compute, exchange"]["median"]
    without = alone["compute"]["median"] / both["compute"]["median"]
    summary = {
        "gradient_mb": round(gradient_bytes / 1e6, 1),
        "link_gb_s": round(gb_s, 2),
        "hop_us": round(hop_s * 1e6, 1),
        "exchange_predicted_ms": round(1e3 * predicted.exchange_s, 2),
        "exposed_predicted_ms": round(1e3 * predicted.exposed_s, 2),
        "exposed_measured_ms": round(1e3 * (both["compute, exchange"]["median"] - both["compute"]["median"]), 2),
        "efficiency_predicted": round(predicted.efficiency, 3),
        "efficiency_measured": round(measured, 3),
        "efficiency_measured_without_exchange": round(without, 3),
    }
    print("\n".join(f"  {name:<38}{value:>10}" for name, value in summary.items()))
    if given.json:
        command = (
            f"python benchmarks/scaling_two_ranks.py DATA --rounds {given.rounds} --local_batch {given.local_batch}"
        )
        facts = {
            "command": command,
            "machine": describe_machine(),
            "summary": summary,
            "one": results[1],
            "two": results[2],
        }
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--link"]:
        measure_link(sys.argv[2], float(sys.argv[3]))
    else:
        main()
