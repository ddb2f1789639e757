"""CPU time of an image in this project's loader and in torchvision's, timm's, LitData's, FFCV's and SPDL's, on the same
images.

    python benchmarks/loaders.py DATA [--shards SHARDS] [--images 576]

DATA: a data root with an index and images in class folders. The loaders take turns, a process each; the ratios are
found round by round. A loader that is not installed (timm, litdata, ffcv, spdl) is named in the table. Each is used as
its own project uses it. The result goes to --json (default: runs/bench).
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from pipeline.dataset.index.index import index_folder, open_index
from pipeline.insight.bench.interleaved import Candidate, Unavailable, run_interleaved
from pipeline.insight.bench.loader import WARM_UP, check_roots, own_candidates, report
from pipeline.insight.bench.results import default_path, write_result
from pipeline.limits import available_cores

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def class_folders(root: str, split: str) -> Path:
    """The folder of class folders that ImageFolder reads. Raises Unavailable where the data are shards."""
    index = open_index(index_folder(Path(root)))
    part = index.splits[split]
    if part.shards:
        raise Unavailable("reads no tar shards")
    path = part.path(0).parent.parent
    if len([entry for entry in path.iterdir() if entry.is_dir()]) != index.num_classes:
        raise Unavailable(f"requires class folders; {path} has none")
    return path


def torchvision_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """ImageFolder and DataLoader with PIL, as in torchvision's reference training script: float32, normalized."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets, transforms

    if split == "train":
        cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        cut = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    transform = transforms.Compose([*cut, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    dataset = datasets.ImageFolder(str(class_folders(root, split)), transform)
    sampler = RandomSampler(dataset, num_samples=images)
    loader = DataLoader(dataset, batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(targets) for _, targets in loader)


def torchvision_io_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """torchvision.io's decoder and v2 transforms on uint8, in this process: without DataLoader and what that costs."""
    from torchvision.datasets import ImageFolder
    from torchvision.io import read_file

    torch.set_num_threads(1)
    files = [path for path, _ in ImageFolder(str(class_folders(root, split))).samples]
    transform = io_transform(split, size)

    def one_round() -> int:
        count = 0
        while count < images:
            order = torch.randperm(len(files)).tolist() if split == "train" else range(len(files))
            for first in range(0, len(files), batch):
                some = order[first : first + batch]
                count += len(torch.stack([transform(read_file(files[i])) for i in some]))
                if count >= images:
                    break
        return count

    return one_round


def io_transform(split: str, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The bytes of a JPEG -> uint8 [3, size, size], by torchvision.io and v2."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    if split == "train":
        steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    else:
        steps = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    transform = v2.Compose(steps)
    return lambda data: transform(decode_jpeg(data, mode=ImageReadMode.RGB))


def read_for_litdata(item: tuple[str, int]) -> dict:
    """A sample of LitData's optimized form: the bytes as they are."""
    return {"image": Path(item[0]).read_bytes(), "target": item[1]}


def litdata_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """LitData's chunks of the same JPEG bytes (written first, not timed), torchvision.io and v2, in this process."""
    try:
        import litdata
    except ImportError as error:
        raise Unavailable(f"litdata can't be imported ({error})") from error
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)
    transform = io_transform(split, size)

    class Decoded(litdata.StreamingDataset):
        def __getitem__(self, index: object) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return transform(torch.frombuffer(bytearray(sample["image"]), dtype=torch.uint8)), sample["target"]

    folder = tempfile.mkdtemp(prefix="bench-litdata-")
    samples = ImageFolder(str(class_folders(root, split))).samples
    litdata.optimize(read_for_litdata, samples, folder, chunk_bytes="64MB", num_workers=1)
    dataset = Decoded(folder, shuffle=split == "train")
    return _rounds(litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=0), images)


def timm_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """timm's create_loader with its uint8 collation; what it does on the device afterwards is left out."""
    try:
        from timm.data import create_dataset, create_loader
    except ImportError as error:
        raise Unavailable(f"timm can't be imported ({error})") from error
    dataset = create_dataset("", str(class_folders(root, split)))
    options = {"color_jitter": 0.0} if split == "train" else {"crop_pct": 224 / 256}
    prefetching = create_loader(
        dataset,
        (3, size, size),
        batch,
        is_training=split == "train",
        interpolation="bilinear",
        num_workers=max(1, workers),
        device=torch.device("cpu"),
        **options,
    )
    loader = prefetching.loader

    return _rounds(loader, images)


def ffcv_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """FFCV's loader on the same JPEG bytes, written into its own format first (not timed)."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor
        from ffcv.writer import DatasetWriter
    except (ImportError, OSError) as error:
        raise Unavailable(f"ffcv can't be imported ({error})") from error
    from torchvision.datasets import ImageFolder

    folder = Path(tempfile.mkdtemp(prefix="bench-ffcv-"))
    path = folder / f"{split}.beton"
    writer = DatasetWriter(str(path), {"image": RGBImageField(write_mode="jpg"), "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(ImageFolder(str(class_folders(root, split))))
    if split == "train":
        image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), ToTensor()]
    else:
        image = [CenterCropRGBImageDecoder((size, size), ratio=224 / 256), ToTensor()]
    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=max(1, workers),
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )

    return _rounds(loader, images)


def spdl_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """SPDL's pipeline of threads on the files: FFmpeg decodes, and its filters crop, resize and flip, to uint8."""
    try:
        import spdl.io
        from spdl.pipeline import PipelineBuilder
    except (ImportError, OSError) as error:
        raise Unavailable(f"spdl can't be imported ({error})") from error
    from torchvision.datasets import ImageFolder

    files = [path for path, _ in ImageFolder(str(class_folders(root, split))).samples]

    def decode(file: str) -> object:
        packets = spdl.io.demux_image(file)
        steps = spdl_filters(split, size, packets.width, packets.height)
        description = spdl.io.get_video_filter_desc(filter_desc=steps, pix_fmt="rgb24")
        return spdl.io.decode_packets(packets, filter_desc=description)

    def collate(frames: list) -> torch.Tensor:
        return spdl.io.to_torch(spdl.io.convert_frames(frames))

    def one_pass() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(files)).tolist() if split == "train" else range(len(files))
        builder = PipelineBuilder().add_source(files[i] for i in order).pipe(decode, concurrency=max(1, workers))
        built = builder.aggregate(batch).pipe(collate).add_sink(3).build(num_threads=max(1, workers))
        with built.auto_stop():
            for made in built:
                yield made, torch.zeros(len(made))

    return _rounds(Passes(one_pass), images)


def spdl_filters(split: str, size: int, width: int, height: int) -> str:
    """FFmpeg's filters for an image of this size: torchvision's random window, resized and flipped; or the center."""
    from torchvision.transforms import RandomResizedCrop

    if split != "train":
        short = round(size * 256 / 224)
        scale = short / min(width, height)
        return f"scale={round(width * scale)}:{round(height * scale)}:flags=bilinear,crop={size}:{size}"
    image = torch.empty(1, height, width, device="meta")
    top, left, tall, wide = RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
    flip = ",hflip" if torch.rand(()) < 0.5 else ""
    return f"crop={wide}:{tall}:{left}:{top},scale={size}:{size}:flags=bilinear{flip}"


class Passes:
    """An iterable that calls `one_pass` for each pass."""

    def __init__(self, one_pass: Callable[[], Iterator]) -> None:
        self.one_pass = one_pass

    def __iter__(self) -> Iterator:
        return self.one_pass()


def _rounds(loader: Iterable, images: int) -> Callable[[], int]:
    """Whole passes over a loader of (images, targets) until `images` have come; returns how many did."""

    def one_round() -> int:
        count = 0
        while count < images:
            for _, targets in loader:
                count += len(targets)
        return count

    return one_round


OTHERS = {
    "torchvision": torchvision_loader,
    "torchvision.io": torchvision_io_loader,
    "timm": timm_loader,
    "litdata": litdata_loader,
    "ffcv": ffcv_loader,
    "spdl": spdl_loader,
}


def other_candidates(arguments: dict) -> list[Candidate]:
    """Other projects' loaders; one that crashes is named in the table."""
    return [Candidate(other, make, arguments, may_crash=True) for other, make in OTHERS.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data root with an index and images in class folders")
    parser.add_argument("--shards", help="a data root of shards with reduced images, measured as well")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--batch_size", type=int, default=64, help="images a batch")
    parser.add_argument("--images", type=int, default=384, help="images a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after three that do not")
    parser.add_argument("--threads", type=int, help="decoding threads and worker processes; default: the cores")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    data, shards = check_roots(options.data, options.shards)
    threads = options.threads or available_cores()
    common = {"size": options.size, "batch": options.batch_size, "images": options.images}
    result = {"data": Path(data).name, "threads": threads, **common, "rounds": options.rounds, "splits": {}}
    for name, own in own_candidates(data, shards, **common, threads=threads).items():
        split = {"training": "train", "validation": "val"}[name]
        arguments = {"root": data, "split": split, **common, "workers": threads}
        others = other_candidates(arguments)
        measured = run_interleaved([*own, *others], options.rounds, WARM_UP, f"loaders, {name}")
        result["splits"][name] = report(name, measured)
    write_result(options.json or default_path("loaders"), "loaders", ["python", *sys.argv], result)


if __name__ == "__main__":
    main()
