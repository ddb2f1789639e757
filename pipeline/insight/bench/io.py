"""`bench io`: reading the bytes of training samples in a run's order, checked, without decoding them."""

import os
import time
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.insight.bench.arena import Spread
from pipeline.insight.bench.table import rows


def io(data: str, batch_size: int = 256, batches: int = 20, threads: str = "1,4,8,16", cold: bool = False) -> dict:
    """How fast the training samples' bytes can be read, in the order in which a run reads them.

    Args:
        data: a data root with an index: an image tree or shards.
        batch_size: images a batch.
        batches: batches for each number of threads.
        threads: numbers of reading threads to try.
        cold: ask the operating system to forget the files first (what it holds for others stays).
    """
    from pipeline.dataset.index.index import index_folder, open_index
    from pipeline.loader.source import Source, UnreadableSample
    from pipeline.progress import Progress

    root = Path(data).expanduser()
    split = open_index(index_folder(root)).splits["train"]
    try:
        numbers = [int(part) for part in threads.split(",")]
    except ValueError:
        raise UserError(f"--threads {threads} is no list of numbers; give e.g. 1,4,8") from None
    order = np.random.default_rng(0).permutation(len(split))
    found, result = {}, {}
    with Progress("bench io", len(numbers) * batches, "batches") as progress:
        for turn, count in enumerate(numbers):
            source, rates, cpu_us = Source(split, count), [], []
            for number in range(batches + 1):
                start = (turn * (batches + 1) + number) * batch_size
                ids = order[np.arange(start, start + batch_size) % len(order)]
                if cold:
                    _forget(split, ids)
                wall, cpu = time.perf_counter(), time.process_time()
                read = source.read_batch(ids)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                bad = next((item for item in read if isinstance(item, UnreadableSample)), None)
                if bad is not None:
                    raise UserError(f"{source.describe(bad.sample_id)}: {bad.reason}; see pipeline verify {data}")
                if number:  # the first opens shards
                    rates.append((batch_size / wall, sum(map(len, read)) / wall / 1e6))
                    cpu_us.append(1e6 * cpu / batch_size)
                    progress.advance(1)
            source.close()
            images, megabytes = (Spread.of(values) for values in zip(*rates, strict=True))
            cost = Spread.of(cpu_us)
            found[f"{count} threads"] = (
                f"{images.median:10,.0f}   {megabytes.median:9,.1f}   {cost.median:9.1f}"
                f"      ({images.least:,.0f} to {images.greatest:,.0f} images/s)"
            )
            result[str(count)] = {
                "images_per_s": images.plain(1), "mb_per_s": megabytes.plain(2), "cpu_us_an_image": cost.plain(2)
            }  # fmt: skip
    kind = f"{len(split.shards)} shards" if split.shards else "an image tree"
    print(f"{root.name}: {len(split):,} training images in {kind}, {'cold' if cold else 'as cached as they are'}")
    print(rows({"": f"{'images/s':>10}   {'MB/s':>9}   {'CPU us':>9}", **found}))
    return {"data": root.name, "shards": len(split.shards), "cold": cold, "batch_size": batch_size, "threads": result}


def _forget(split, ids: np.ndarray) -> None:
    """Drop these samples' pages from the cache of the operating system."""
    for path in {split.path(int(sample)) for sample in ids}:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
