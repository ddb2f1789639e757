"""`bench io`: reading and checking the bytes of training samples in a run's order, without decoding them."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.command import parse_numbers
from pipeline.errors import UserError
from pipeline.insight.bench.interleaved import Spread, format_rows

if TYPE_CHECKING:
    from pipeline.dataset.index.index import Split


def io(
    data: str,
    batch_size: int = 256,
    batches: int = 20,
    threads: str = "1,4,8,16",
    cold: bool = False,
    index: str | None = None,
) -> dict:
    """How fast the training samples' bytes can be read, in the order in which a run reads them.

    Args:
        data: a data root with an index: an image tree or shards.
        batch_size: images a batch.
        batches: batches for each number of threads.
        threads: numbers of reading threads to try.
        cold: drop the files from the operating system's page cache first.
        index: folder of the index; default DATA/index.
    """
    from pipeline.dataset.index.index import index_folder, open_index
    from pipeline.loader.source import Source, UnreadableSample
    from pipeline.progress import Progress

    root = Path(data).expanduser()
    split = open_index(Path(index).expanduser() if index else index_folder(root)).splits["train"]
    numbers = parse_numbers("--threads", threads, "1,4,8")
    order = np.random.default_rng(0).permutation(len(split))
    found: dict[str, str] = {}
    result: dict[str, Any] = {}
    with Progress("bench io", len(numbers) * batches, "batches") as progress:
        for turn, count in enumerate(numbers):
            source, rates, cpu_us = Source(split, count), [], []
            for number in range(batches + 1):
                start = (turn * (batches + 1) + number) * batch_size
                ids = order[np.arange(start, start + batch_size) % len(order)]
                if cold:
                    _drop_from_cache(split, ids)
                source.threads.hurry(more=True)  # all threads are to read
                wall, cpu = time.perf_counter(), time.process_time()
                read = source.read_batch(ids)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                for bad in (item for item in read if isinstance(item, UnreadableSample)):
                    raise UserError(f"{source.describe(bad.sample_id)}: {bad.reason}; see pipeline verify {data}")
                if number:  # the first opens shards
                    size = sum(len(item) for item in read if isinstance(item, np.ndarray))
                    rates.append((batch_size / wall, size / wall / 1e6))
                    cpu_us.append(1e6 * cpu / batch_size)
                    progress.advance(1)
            source.close()
            images, megabytes = (Spread.of(values) for values in zip(*rates, strict=True))
            cost = Spread.of(cpu_us)
            found[f"{count} threads"] = (
                f"{images.median:10,.0f}   {megabytes.median:9,.1f}   {cost.median:9.1f}"
                f"      ({images.minimum:,.0f} to {images.maximum:,.0f} images/s)"
            )
            result[str(count)] = {
                "images_per_s": images.as_dict(1), "mb_per_s": megabytes.as_dict(2), "cpu_us_an_image": cost.as_dict(2)
            }  # fmt: skip
    kind = f"{len(split.shards)} shards" if split.shards else "an image tree"
    print(f"{root.name}: {len(split):,} training images in {kind}, {'cold' if cold else 'page cache as it is'}")
    print(format_rows({"": f"{'images/s':>10}   {'MB/s':>9}   {'CPU us':>9}", **found}))
    return {"data": root.name, "shards": len(split.shards), "cold": cold, "batch_size": batch_size, "threads": result}


def _drop_from_cache(split: "Split", ids: np.ndarray) -> None:
    """Drop these samples' files from the page cache."""
    for path in {split.path(int(sample)) for sample in ids}:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
