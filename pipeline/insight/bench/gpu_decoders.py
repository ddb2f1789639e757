"""Ways for DALI to decode for a GPU, beside each other: whether each works on this card, and what it gives.

The hardware's decoder has been seen to crash where it decodes only a window (nvImageCodec, issue 55), so each is tried
in a process of its own.
"""

from collections.abc import Callable

import numpy as np

WAYS = ("window on the CPU", "whole image, mixed", "window, mixed")


def decode_for_gpu(root: str, size: int, batch: int, images: int, threads: int, way: str) -> Callable[[], int]:
    """A round decodes and resizes `images` training images into the GPU's memory, by one of `WAYS`."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    from pipeline.config import DataConfig, TrainConfig
    from pipeline.dataset.index.index import index_folder, open_index
    from pipeline.insight.bench.arena import Absent
    from pipeline.loader.build import make_train_plan
    from pipeline.loader.source import Source

    if not torch.cuda.is_available():
        raise Absent("no CUDA device")
    index = open_index(index_folder(root))
    plan = make_train_plan(index, DataConfig(root, image_size=size).resolve(), TrainConfig(global_batch_size=batch))
    source = Source(index.splits["train"], threads)
    steps = max(1, images // batch)
    planned = [plan.local(step) for step in range(steps)]
    ready = [source.read_batch(p.ids) for p in planned]
    feed = iter(())

    def rows() -> tuple:
        data, p = next(feed)
        boxes = [p.windows[:, [1, 0]], p.windows[:, [3, 2]]]
        start = boxes[0] if way == "whole image, mixed" else np.zeros_like(boxes[0])
        return data, *map(
            np.ascontiguousarray, (*boxes, start.astype(np.float32), (start + boxes[1]).astype(np.float32))
        )

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=0, exec_dynamic=True, prefetch_queue_depth=2)
    def graph():
        data, anchor, shape, start, end = fn.external_source(
            source=rows,
            num_outputs=5,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT],
            ndim=[1, 1, 1, 1, 1],
        )
        options = {"output_type": types.RGB, "adjust_orientation": False}
        if way == "whole image, mixed":
            decoded = fn.decoders.image(data, device="mixed", **options)
        else:
            device = "cpu" if way == "window on the CPU" else "mixed"
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
