"""CIFAR-10 as a tree of class folders: the archive of its authors, verified by checksum, written as PNG images."""

import hashlib
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.command import run_command
from pipeline.counts import count
from pipeline.dataset.index.index import Index, has_index, index_folder, is_current, open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.lock import locked
from pipeline.errors import EXIT_OK, TransientError, UserError
from pipeline.files import atomic_open
from pipeline.progress import Progress

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"  #: as published beside the archive
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"  #: in the archive
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
STATE = ".cifar10"  #: holds the archive until the tree is complete
TIMEOUT_S = 30.0  #: without data from the server
CHUNK = 1 << 20


def fetch_cifar10(dest: str, from_file: str | None = None) -> int:
    """Download CIFAR-10 into DEST/train and DEST/val, a folder a class, as PNG (lossless), and index it.

    Args:
        dest: folder of the data set; requires 600 MB during the conversion, 250 MB afterwards.
        from_file: read this cifar-10-python.tar.gz instead of downloading (also: --from FILE); its checksum must match.
    """
    root = Path(dest).absolute()
    if has_index(index_folder(root)) and is_current(index := open_index(index_folder(root))):
        print(f"{root}: complete: {describe(index)}")
        return EXIT_OK
    for split in BATCHES:
        if (root / split).exists() and not (root / STATE).exists():
            raise UserError(f"{root / split} exists already; give another folder, or index it: pipeline index {root}")
    try:
        (root / STATE).mkdir(parents=True, exist_ok=True)
        busy = f"another fetch is running in {root}; wait for it or stop it"
        with locked(root / STATE / "lock", busy, wait=False):
            archive = check_archive(Path(from_file).expanduser()) if from_file else download(root / STATE / ARCHIVE)
            for split in BATCHES:
                if not (root / split).exists():
                    write_tree(root, split, archive)
            index = build_index(root)
            shutil.rmtree(root / STATE)
    except OSError as error:
        raise UserError(f"{error.filename or root} can't be written or read ({error.strerror})") from error
    print(f"{root}: complete and verified: {describe(index)}")
    return EXIT_OK


def describe(index: Index) -> str:
    counts = " and ".join(f"{len(split):,} {name}" for name, split in index.splits.items())
    return f"{counts} images of {count(index.num_classes, 'class')}"


def check_archive(file: Path) -> Path:
    """The user's archive. Raises UserError where there is none or its checksum is wrong."""
    if not file.is_file():
        raise UserError(f"--from_file {file}: no such file")
    if not has_checksum(file):
        raise UserError(f"--from_file {file}: its MD5 checksum is not {ARCHIVE_MD5}; download it again from {URL}")
    return file


def has_checksum(file: Path) -> bool:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "md5").hexdigest() == ARCHIVE_MD5


def download(archive: Path) -> Path:
    """Download the archive unless it is there, and verify it. Raises TransientError where that fails."""
    import requests

    if archive.is_file() and has_checksum(archive):
        return archive
    try:
        with requests.get(URL, stream=True, timeout=TIMEOUT_S) as response:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            with atomic_open(archive) as file, Progress("CIFAR-10 download", size, "bytes") as progress:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    progress.advance(len(chunk))
    except requests.RequestException as error:
        raise TransientError(
            f"CIFAR-10 could not be downloaded from {URL} ({type(error).__name__}); "
            f"run the same command again, or give --from FILE"
        ) from error
    if not has_checksum(archive):
        archive.unlink()
        raise TransientError(
            f"the CIFAR-10 archive from {URL} does not have the checksum {ARCHIVE_MD5}; "
            f"run the same command again, or give --from FILE"
        )
    return archive


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and plain values, and calls nothing else that a pickle names."""

    ALLOWED = frozenset(
        [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
        + [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise UserError(
                f"the CIFAR-10 archive names {module}.{name}, which is not an array; give another --from FILE"
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_split(archive: Path, split: str) -> tuple[list[str], np.ndarray, list[int]]:
    """The class names, the images (uint8 [N, 32, 32, 3]) and their labels, from a verified archive."""
    members = {}
    with tarfile.open(archive) as tar:
        for name in ("batches.meta", *BATCHES[split]):
            file = tar.extractfile(f"{FOLDER}/{name}")
            assert file is not None
            members[name] = _ArrayUnpickler(file, encoding="latin1").load()
    classes = members.pop("batches.meta")["label_names"]
    images = np.concatenate([batch["data"] for batch in members.values()]).reshape(-1, 3, 32, 32)
    labels = [label for batch in members.values() for label in batch["labels"]]
    return classes, images.transpose(0, 2, 3, 1), labels


def write_tree(root: Path, split: str, archive: Path) -> None:
    """Write one split under a temporary name and rename it when it is complete."""
    from PIL import Image

    classes, images, labels = read_split(archive, split)
    part = root / STATE / split
    shutil.rmtree(part, ignore_errors=True)
    for name in classes:
        (part / name).mkdir(parents=True)
    numbers = [0] * len(classes)
    with Progress(f"CIFAR-10 {split}", len(labels), "images") as progress:
        for pixels, label in zip(images, labels, strict=True):
            Image.fromarray(pixels).save(part / classes[label] / f"{numbers[label]:04d}.png")
            numbers[label] += 1
            progress.advance()
    part.replace(root / split)


def main(argv: list[str]) -> int:
    return run_command(fetch_cifar10, "fetch cifar10", spell_out_from(argv))


def spell_out_from(argv: list[str]) -> list[str]:
    """`--from FILE` as `--from_file FILE`: `from` is a keyword and can't name a parameter."""
    return ["--from_file" + word[6:] if word.split("=")[0] == "--from" else word for word in argv]
