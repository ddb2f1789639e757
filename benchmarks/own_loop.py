"""What `TrainLoader` costs beside the stream of batches that `pipeline train` reads, on the same steps.

    python benchmarks/own_loop.py DATA [--images 384] [--rounds 15]

DATA: a data root with an index. Two pairs take turns, a process each: uint8 batches (`raw=True`) beside the stream's,
and finished ones (RandAugment, normalized, mixup) beside the same functions called on the stream's batches. The ratios
are found round by round. The result goes to --json (default: runs/bench).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline import TrainLoader
from pipeline.augment.mixing import apply_erase_mix, soft_targets
from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.dataset.index.index import index_folder, open_index
from pipeline.dataset.workers import available_cores
from pipeline.insight.bench.interleaved import Candidate, ratios, run_interleaved, spread_table
from pipeline.insight.bench.loader import check_roots
from pipeline.insight.bench.results import default_path, write_result
from pipeline.loader.build import make_train_stream
from pipeline.loader.plan import make_train_plan
from pipeline.loader.prefetch import OngoingBatches
from pipeline.model.build import Normalized
from pipeline.rank_info import RankInfo

FINISHED = AugmentConfig(policy="randaugment", mixup=0.2)


def loader_rounds(root: str, batch: int, steps: int, threads: int, raw: bool) -> Callable[[], int]:
    """A round reads the next `steps` batches of a `TrainLoader`."""
    augment = AugmentConfig() if raw else FINISHED
    loader = TrainLoader(root, batch, augment=augment, raw=raw, device="cpu", data=DataConfig(threads=threads))
    start = 0

    def one_round() -> int:
        nonlocal start
        start += steps
        return sum(len(targets) for _, targets in loader._batches(start - steps, start))

    return one_round


def stream_rounds(root: str, batch: int, steps: int, threads: int, raw: bool) -> Callable[[], int]:
    """A round reads the same batches of the inner stream and, unless `raw`, finishes them."""
    augment = AugmentConfig() if raw else FINISHED
    data, index = DataConfig(root, threads=threads).resolve(), open_index(index_folder(Path(root)))
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=batch), augment)
    stream = make_train_stream(index, plan, data, RankInfo(), applies=augment)
    network = Normalized(torch.nn.Identity(), data.mean, data.std, channels_last=True)
    ongoing = OngoingBatches(sys.maxsize)  # reads on between the rounds, as a run and the loader do
    start = 0

    def finish(found) -> int:
        if not raw:
            apply_erase_mix(network.normalize(found.augmented(augment)), found.erase_mix, augment.mix_group)
            soft_targets(found.targets, found.erase_mix.shares, augment.mix_group, index.num_classes)
        return len(found)

    def one_round() -> int:
        nonlocal start
        start += steps
        batches = ongoing.read(stream, start - steps, start, frozenset())
        return sum(finish(next(batches)) for _ in range(steps))

    return one_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data root with an index")
    parser.add_argument("--batch_size", type=int, default=64, help="images a batch")
    parser.add_argument("--images", type=int, default=384, help="images a round")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count, after three that do not")
    parser.add_argument("--threads", type=int, default=available_cores(), help="decoding threads")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    root, _ = check_roots(options.data, None)
    steps = max(1, options.images // options.batch_size)
    common = {"root": root, "batch": options.batch_size, "steps": steps, "threads": options.threads}
    result = {"batch_size": options.batch_size, "images": options.images, "threads": options.threads, "kinds": {}}
    for kind, raw in (("raw", True), ("finished", False)):
        makers = {"stream": stream_rounds, "TrainLoader": loader_rounds}
        candidates = [Candidate(name, make, common | {"raw": raw}) for name, make in makers.items()]
        measured = run_interleaved(candidates, options.rounds, 3, f"batches, {kind}")
        cpu, wall = (ratios(measured, "stream", "TrainLoader", key) for key in ("cpu_ms", "wall_ms"))
        assert cpu is not None and wall is not None
        print(f"{kind}: CPU ms an image\n{spread_table(measured, 'cpu_ms')}")
        print(f"  TrainLoader / stream: {cpu.median:.3f} of CPU time ({cpu.minimum:.3f} to {cpu.maximum:.3f})")
        print(f"  TrainLoader / stream: {wall.median:.3f} of wall time ({wall.minimum:.3f} to {wall.maximum:.3f})")
        result["kinds"][kind] = {
            **{name: one.as_dict() for name, one in measured.items()},
            "cpu_ratio": cpu.as_dict(),
            "wall_ratio": wall.as_dict(),
        }
    write_result(options.json or default_path("own_loop"), "own_loop", ["python", *sys.argv], result)


if __name__ == "__main__":
    main()
