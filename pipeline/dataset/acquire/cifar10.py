"""CIFAR-10 as a tree of class folders, by torchvision's downloader, which knows its address and checksums.

Beside the data set's room, because that never imports torch; `pipeline fetch cifar10 DEST` comes here.
"""

import shutil
from pathlib import Path

from pipeline.command import run_command
from pipeline.dataset.index.index import index_folder, is_current, open_index
from pipeline.dataset.index.scan import build_index
from pipeline.errors import EXIT_OK, TransientError, UserError
from pipeline.progress import Progress

STATE = ".cifar10"  #: holds the archive until the tree is whole


def fetch_cifar10(dest: str, from_file: str | None = None) -> int:
    """Download CIFAR-10 into DEST/train and DEST/val, a folder a class, as PNG (lossless), and index it.

    Args:
        dest: folder of the data set; needs 600 MB while it is made, 250 MB afterwards.
        from_file: take this cifar-10-python.tar.gz instead of downloading (also: --from FILE); its checksum must fit.
    """
    root = Path(dest).absolute()
    if (index_folder(root) / "index.json").exists() and is_current(index := open_index(index_folder(root))):
        print(f"{root}: complete: {describe(index)}")
        return EXIT_OK
    for split in ("train", "val"):
        if (root / split).exists() and not (root / STATE).exists():
            raise UserError(f"{root / split} is there already; give another folder, or index it: pipeline index {root}")
    try:
        (root / STATE).mkdir(parents=True, exist_ok=True)
        if from_file:
            take_archive(Path(from_file).expanduser(), root / STATE)
        for split, train in (("train", True), ("val", False)):
            if not (root / split).exists():
                write_tree(root, split, train)
        index = build_index(root)
        shutil.rmtree(root / STATE)
    except OSError as error:
        raise UserError(f"{error.filename or root} can't be written or read ({error.strerror})") from error
    print(f"{root}: complete and verified: {describe(index)}")
    return EXIT_OK


def describe(index) -> str:
    counts = " and ".join(f"{len(split):,} {name}" for name, split in index.splits.items())
    return f"{counts} images of {index.num_classes} classes"


def take_archive(file: Path, state: Path) -> None:
    """Put an archive where the downloader looks for it. Raises UserError where there is none."""
    from torchvision.datasets import CIFAR10

    if not file.is_file():
        raise UserError(f"--from_file {file}: no such file")
    if not (state / CIFAR10.filename).exists():
        shutil.copyfile(file, state / CIFAR10.filename)


def read_split(state: Path, train: bool):
    """torchvision's data set, downloaded and verified. Raises TransientError where that fails."""
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(str(state), train=train, download=True)
    except (RuntimeError, OSError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        archive = state / CIFAR10.filename
        raise TransientError(
            f"CIFAR-10 could not be downloaded from {CIFAR10.url} or does not have its checksum ({reason}); "
            f"start again, or give --from FILE; what is there: {archive}"
        ) from error


def write_tree(root: Path, split: str, train: bool) -> None:
    """Write one split beside its place and rename it when it is whole."""
    from PIL import Image

    data = read_split(root / STATE, train)
    part = root / STATE / split
    shutil.rmtree(part, ignore_errors=True)
    for name in data.classes:
        (part / name).mkdir(parents=True)
    numbers = [0] * len(data.classes)
    with Progress(f"CIFAR-10 {split}", len(data.targets), "images") as progress:
        for pixels, label in zip(data.data, data.targets, strict=True):
            Image.fromarray(pixels).save(part / data.classes[label] / f"{numbers[label]:04d}.png")
            numbers[label] += 1
            progress.advance()
    part.replace(root / split)


def main(argv: list[str]) -> int:
    argv = ["--from_file" + word[6:] if word.split("=")[0] == "--from" else word for word in argv]
    return run_command(fetch_cifar10, "fetch cifar10", argv)
