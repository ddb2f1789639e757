"""Ways for DALI to decode JPEG files for a GPU: whether each works on this GPU, and how fast it is.

    python benchmarks/gpu_decoders.py DATA [--batch_size 256] [--images 2560]

The hardware decoder has been seen to crash where it decodes only a crop (nvImageCodec, issue 55), so each way runs in a
process of its own, and a crash is a line of the table. Without a GPU every line says so.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.insight.bench.interleaved import Candidate, Unavailable, run_interleaved
from pipeline.insight.bench.loader import check_roots, report
from pipeline.insight.bench.results import default_path, write_result
from pipeline.limits import available_cores

WAYS = ("crop on the CPU", "whole image, GPU", "crop, GPU")


def decode_for_gpu(root: str, size: int, batch: int, images: int, threads: int, way: str) -> Callable[[], int]:
    """A round decodes and resizes `images` training images into the GPU's memory, by one of `WAYS`."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    from pipeline.config import DataConfig, TrainConfig
    from pipeline.dataset.index.index import index_folder, open_index
    from pipeline.loader.plan import make_train_plan
    from pipeline.loader.source import Source

    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device")
    index = open_index(index_folder(Path(root)))
    plan = make_train_plan(index, DataConfig(root, image_size=size).resolve(), TrainConfig(global_batch_size=batch))
    source = Source(index.splits["train"], threads)
    steps = max(1, images // batch)
    planned = [plan.local(step) for step in range(steps)]
    ready = [source.read_batch(p.ids) for p in planned]
    feed: Iterator[tuple[Any, Any]] = iter(())

    def inputs() -> tuple:
        data, p = next(feed)
        boxes = [p.windows[:, [1, 0]], p.windows[:, [3, 2]]]
        start = boxes[0] if way == "whole image, GPU" else np.zeros_like(boxes[0])
        return data, *map(
            np.ascontiguousarray, (*boxes, start.astype(np.float32), (start + boxes[1]).astype(np.float32))
        )

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=0, exec_dynamic=True, prefetch_queue_depth=2)
    def graph() -> Any:
        data, anchor, shape, start, end = fn.external_source(
            source=inputs,
            num_outputs=5,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT],
            ndim=[1, 1, 1, 1, 1],
        )
        options = {"output_type": types.RGB, "adjust_orientation": False}
        if way == "whole image, GPU":
            decoded = fn.decoders.image(data, device="mixed", **options)
        else:
            device = "cpu" if way == "crop on the CPU" else "mixed"
            decoded = fn.decoders.image_slice(data, anchor, shape, axes=[0, 1], device=device, **options)
            decoded = decoded.gpu() if device == "cpu" else decoded
        return fn.resize(
            decoded, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True, roi_start=start, roi_end=end
        )

    pipeline = graph()
    pipeline.build()

    def one_round() -> int:
        nonlocal feed
        feed = iter(zip(ready, planned, strict=True))
        count = 0
        while True:
            try:
                (out,) = pipeline.run()
            except StopIteration:
                pipeline.reset()
                torch.cuda.synchronize()
                return count
            count += len(out)

    return one_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data root with an index")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--batch_size", type=int, default=256, help="images a batch")
    parser.add_argument("--images", type=int, default=2560, help="images a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after three that do not")
    parser.add_argument("--threads", type=int, help="decoding threads; default: the cores")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    data, _ = check_roots(options.data, None)
    common = {"size": options.size, "batch": options.batch_size, "images": options.images}
    common["threads"] = options.threads or available_cores()
    ways = [Candidate(way, decode_for_gpu, {"root": data, **common, "way": way}, may_crash=True) for way in WAYS]
    result = report("decoding for a GPU", run_interleaved(ways, options.rounds, 3, "GPU decoders"), WAYS[:1])
    write_result(options.json or default_path("gpu_decoders"), "gpu_decoders", ["python", *sys.argv], common | result)


if __name__ == "__main__":
    main()
