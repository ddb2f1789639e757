"""`bench loader`: CPU time of an image in this project's loader: DALI and reference decoder, image tree and shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.dataset.index.index import has_index, index_folder
from pipeline.errors import UserError
from pipeline.insight.bench.interleaved import (
    Candidate,
    Measured,
    ratio_line,
    ratios,
    rss_mib,
    run_interleaved,
    spread_table,
)
from pipeline.limits import MOST_CORES, available_cores

WARM_UP = 3  # rounds: buffers grow in the first ones
BASELINES = ("DALI", "DALI, shards", "DALI, crops only")


def loader(
    data: str,
    shards: str | None = None,
    size: int = 224,
    batch_size: int = 64,
    images: int = 384,
    rounds: int = 7,
    threads: int | None = None,
    flat: int = 0,
    index: str | None = None,
) -> dict:
    """CPU time of an image in the loader: with DALI and without, from an image tree and from shards.

    Args:
        data: a data root with an index.
        shards: a data root of shards with reduced images (pipeline pack --short_side 256), measured as well.
        size: pixels of an image's side.
        batch_size: images a batch.
        images: images a round.
        rounds: rounds that count, after three that do not.
        threads: decoding threads; default: the cores.
        flat: also read so many images in one go, and report the resident memory after each tenth of them.
        index: folder of the index of `data`; default DATA/index.
    """
    count = threads or available_cores()
    if not 1 <= count <= MOST_CORES:
        raise UserError(f"--threads is {threads}; give a number from 1 to {MOST_CORES:,}")
    index = str(Path(index).expanduser()) if index else None
    data, shards = check_roots(data, shards, index)
    common = {"size": size, "batch": batch_size, "images": images}
    result: dict[str, Any] = {"data": Path(data).name, "threads": count, **common, "rounds": rounds, "splits": {}}
    for split, candidates in own_candidates(data, shards, **common, threads=count, index=index).items():
        measured = run_interleaved(candidates, rounds, WARM_UP, f"bench loader, {split}")
        result["splits"][split] = report(split, measured)
    if flat:
        result["memory_mib"] = memory_over(data, size, batch_size, flat, count, index)
        print(f"\n{flat:,} images in one go: resident MiB " + ", ".join(f"{mib:,.0f}" for mib in result["memory_mib"]))
    return result


def check_roots(data: str, shards: str | None, index: str | None = None) -> tuple[str, str | None]:
    """Both data roots, expanded. Raises UserError for one without an index."""
    roots = [str(Path(root).expanduser()) if root else None for root in (data, shards)]
    for root in filter(None, roots):
        own = index if root == roots[0] else None
        if not has_index(Path(own) if own else index_folder(Path(root))):
            raise UserError(
                f"{own or root} has no index; make one: pipeline index {root}{f' --out {own}' if own else ''}"
            )
    return str(roots[0]), roots[1]


def own_candidates(
    data: str, shards: str | None, size: int, batch: int, images: int, threads: int, index: str | None = None
) -> dict[str, list[Candidate]]:
    """Split -> the variants of this project's loader."""
    from pipeline.insight.bench.streams import pil_decode, stream_rounds

    def candidate(name: str, root: str, split: str, loader: str, **more: bool) -> Candidate:
        arguments = {"root": root, "split": split, "size": size, "batch": batch, "images": images, "threads": threads}
        at = index if root == data else None
        return Candidate(name, stream_rounds, {**arguments, "loader": loader, "index_at": at, **more})

    training = [
        candidate("DALI", data, "train", "dali"),
        candidate("DALI, crops only", data, "train", "dali", crops_only=True),
    ]
    if shards:
        training.append(candidate("DALI, shards", shards, "train", "dali"))
    training += [
        candidate("reference", data, "train", "reference"),
        Candidate("PIL decode alone", pil_decode, {"root": data, "images": images, "index_at": index}),
    ]
    validation = [candidate("DALI", data, "val", "dali"), candidate("reference", data, "val", "reference")]
    return {"training": training, "validation": validation}


def report(title: str, measured: dict[str, Measured], baselines: Sequence[str] = BASELINES) -> dict[str, Any]:
    """Print what was measured, and every candidate's CPU time over that of each baseline; the same as plain values."""
    for key, unit in (("cpu_ms", "CPU ms"), ("wall_ms", "ms")):
        print(f"\n{title}, {unit} an image (median of rounds, minimum and maximum)")
        print(spread_table(measured, key))
    found = {}
    for baseline in filter(measured.__contains__, baselines):
        for name in measured:
            spread = ratios(measured, baseline, name) if name != baseline else None
            if spread is not None:
                found[f"{name} / {baseline}"] = spread.as_dict(3)
                print(ratio_line(name, baseline, spread))
    return {"measured": {name: one.as_dict() for name, one in measured.items()}, "cpu_ratios": found}


def memory_over(root: str, size: int, batch: int, images: int, threads: int, index: str | None = None) -> list[float]:
    """Resident memory, MiB, after each tenth of so many training images."""
    from pipeline.insight.bench.streams import open_stream
    from pipeline.progress import Progress

    stream = open_stream(root, "train", size, batch, threads, "auto", index)
    steps = max(10, images // batch)
    seen = []
    with Progress("bench loader, memory", steps, "batches") as progress:
        for step, _ in enumerate(stream.batches(0, steps), 1):
            progress.advance(1)
            if step % (steps // 10) == 0:
                seen.append(round(rss_mib(), 1))
    stream.close()
    return seen
