"""Decoding with NVIDIA DALI: only the planned window is decoded, then resized and flipped.

What DALI refuses, or sees otherwise than PIL (`pixels.dali_agrees`), it is given as PIL's pixels.

DALI holds no state of the run: bytes, windows and flips come in through external_source, so any step can be first. The
window is decoded on the CPU unless the run's `data.decode` says otherwise: hardware decoders give other pixels than the
CPU's, and a run must not depend on which one a node has. On a GPU DALI resizes it there; without one torch does
(`resize.py`), at an eighth of the cost of DALI's resize on a CPU.
"""

import re
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash

from pipeline.dataset.index.pixels import as_ppm, dali_agrees
from pipeline.loader.decode.resize import Resizer, Resizing
from pipeline.loader.stream import EncodedBatch, UndecodableSample

_OUT_OF_MEMORY = re.compile(r"bad_alloc|out of memory|cannot allocate memory|can't start new thread", re.IGNORECASE)


class DaliDecoder:
    """A DALI pipeline fed from outside.

    Args:
        max_batch_size: size of the largest batch.
        threads: CPU threads of the pipeline.
        device: "cpu", or a CUDA device (resize there; batches are delivered there).
        prefetch: batches decoded ahead.
        interpolation: "bilinear" or "bicubic".
        decode: "cpu", or "mixed": on the CUDA device.

    The size of the output comes with each batch: images may grow from one to the next.
    """

    takes_parts = True

    def __init__(
        self,
        max_batch_size: int,
        threads: int,
        device: torch.device,
        prefetch: int = 2,
        interpolation: str = "bilinear",
        decode: str = "cpu",
    ):
        self.interpolation, self.device, self.decode_on = interpolation, device, decode
        self.settings = {"batch_size": max_batch_size, "num_threads": threads, "prefetch_queue_depth": prefetch}
        self.on_gpu = device.type == "cuda"
        self.resizer = None if self.on_gpu else Resizer(threads, interpolation)
        self.pipeline: Any = None
        self._feed: Iterator[EncodedBatch] = iter(())
        self._feed_failed: RuntimeError | None = None
        self._handed: deque[EncodedBatch] = deque()  # inside DALI's pipeline, oldest first
        self._refused: set[int] = set()  # digests of samples that DALI refused and PIL decodes

    def prepare(self, data: np.ndarray) -> np.ndarray:
        """A sample's bytes; the pixels that PIL finds, uncompressed, where DALI would refuse them or find others."""
        known = dali_agrees(data.data) and not (self._refused and xxhash.xxh3_64_intdigest(data.data) in self._refused)
        return data if known else np.frombuffer(as_ppm(data.data), np.uint8)

    def rescue(self, data: np.ndarray) -> np.ndarray | None:
        """What PIL finds in a sample that DALI refused; it is given to PIL from now on."""
        try:
            pixels = np.frombuffer(as_ppm(data.data), np.uint8)
        except (OSError, ValueError):
            return None
        self._refused.add(xxhash.xxh3_64_intdigest(data.data))
        return None if np.array_equal(pixels, data) else pixels

    def _next(self) -> tuple:
        """DALI's callback: the next batch as lists and arrays of one row a sample."""
        try:
            encoded = next(self._feed)
        except RuntimeError as error:
            self._feed_failed = error
            raise
        self._handed.append(encoded)
        windows, planned = encoded.windows(), encoded.planned
        boxes: tuple[np.ndarray, ...] = (windows[:, [1, 0]], windows[:, [3, 2]])  # axes in the order y, x
        if self.on_gpu:
            sizes, rois = np.full((len(planned), 2), planned.size, np.float32), planned.rois.astype(np.float32)
            boxes += (rois[:, [1, 0]], rois[:, [3, 2]], planned.flips.astype(np.int32), sizes)
        return encoded.data, *map(np.ascontiguousarray, boxes)

    def _build(self) -> Any:
        import nvidia.dali.fn
        import nvidia.dali.types

        dali: Any = nvidia.dali  # its stubs lack much of what it has
        fn, pipeline_def, types = dali.fn, dali.pipeline_def, dali.types

        own = weakref.ref(self)  # so that both are free as soon as nobody has the decoder any more

        def feed() -> tuple:
            decoder = own()
            assert decoder is not None
            return decoder._next()

        types_of_rows = [types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.INT32, types.FLOAT]
        rows = 7 if self.on_gpu else 3
        kind = types.INTERP_CUBIC if self.interpolation == "bicubic" else types.INTERP_LINEAR

        @pipeline_def(device_id=self.device.index or 0 if self.on_gpu else None, exec_dynamic=True, **self.settings)
        def graph() -> Any:
            data, anchor, shape, *more = fn.external_source(
                source=feed,
                num_outputs=rows,
                batch=True,
                no_copy=False,
                dtype=types_of_rows[:rows],
                ndim=[1, 1, 1, 1, 1, 0, 1][:rows],
            )
            images = fn.decoders.image_slice(
                data, anchor, shape, axes=[0, 1], output_type=types.RGB, adjust_orientation=False, device=self.decode_on
            )
            if not self.on_gpu:
                return images
            roi_start, roi_end, flip, size = more
            images = fn.resize(
                images if self.decode_on == "mixed" else images.gpu(),
                size=size,
                interp_type=kind,
                antialias=True,
                roi_start=roi_start,
                roi_end=roi_end,
            )
            return fn.flip(images, horizontal=flip)

        pipe = graph()
        pipe.build()
        return pipe

    def decode(self, batches: Iterable[EncodedBatch]) -> Iterator[torch.Tensor]:
        """Images uint8 [B, H, W, 3] of each batch, in order. After UndecodableSample, `decode` can be called again."""
        self._feed = feed = iter(batches)
        try:
            yield from self._decode()
        finally:
            if self._feed is feed:  # which may know whoever has this decoder
                self._feed = iter(())

    def _decode(self) -> Iterator[torch.Tensor]:
        self._handed = deque()
        pipeline, self.pipeline = self.pipeline or self._build(), None
        resizing: deque[Resizing] = deque()  # on a CPU a batch is resized while the next is decoded
        while True:
            try:
                (images,) = pipeline.run()
            except StopIteration:
                pipeline.reset()
                self.pipeline = pipeline  # drained to the end: good for the next stream
                yield from (batch.result() for batch in resizing)
                return
            except RuntimeError as error:  # a failed pipeline can't be used again
                if _OUT_OF_MEMORY.search(str(error)):  # not caused by an image: none is replaced
                    raise (torch.OutOfMemoryError if self.on_gpu else MemoryError)(_reason(str(error))) from error
                if error is self._feed_failed:
                    raise
                yield from (batch.result() for batch in resizing)
                encoded = self._handed[0]
                position = _sample_number(str(error))
                if position is None:
                    pipeline = None  # its memory is free again
                    position = 0 if len(encoded.data) == 1 else self._find_undecodable(encoded)
                if position is None:
                    raise
                raise UndecodableSample(encoded.step, position, _reason(str(error))) from error
            encoded = self._handed.popleft()
            if self.resizer is None:
                yield self._to_torch(images, encoded.planned.size)
                continue
            resizing.append(self.resizer.start(images, encoded.planned))
            if len(resizing) > 1:
                yield resizing.popleft().result()

    def _find_undecodable(self, encoded: EncodedBatch) -> int | None:
        """The first position of a batch that fails when it is decoded alone: DALI's message does not always say."""
        device = self.device if self.decode_on == "mixed" else torch.device("cpu")  # a GPU may have no room left
        alone = DaliDecoder(1, 1, device, 1, self.interpolation, self.decode_on)
        try:
            for position in range(len(encoded.data)):
                try:
                    list(alone.decode([encoded.only(position)]))
                except UndecodableSample:  # other errors are not the sample's
                    return position
        finally:
            alone.close()
        return None

    def _to_torch(self, images: Any, size: int) -> torch.Tensor:
        """A copy of the GPU's output in memory of torch, ordered on torch's current stream."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        batch = torch.empty((len(images), size, size, 3), dtype=torch.uint8, device=self.device)
        feed_ndarray(images.as_tensor(), batch, cuda_stream=torch.cuda.current_stream(self.device))
        return batch

    def close(self) -> None:
        self.pipeline = None
        if self.resizer:
            self.resizer.close()


def _sample_number(message: str) -> int | None:
    """The position in the batch that DALI's message blames, if it names one."""
    found = re.search(r"sample #(\d+)", message)
    return int(found.group(1)) if found else None


def _reason(message: str) -> str:
    """The line of DALI's long message that says what was wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = (line for line in lines if "sample #" in line or "failure" in line or _OUT_OF_MEMORY.search(line))
    return next(telling, lines[-1] if lines else "")
