"""A synthetic tree as the archive that Kaggle serves: one zip with its member names, or the older one with a tar.gz."""

import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipeline.dataset import imagenet
from pipeline.dataset.synthetic.plan import MARKER, Sample, Settings, choose_recipe, list_samples, make_image, synset
from pipeline.errors import UserError
from pipeline.files import atomic_open
from pipeline.progress import Progress

NESTED = "imagenet_object_localization_patched2019.tar.gz"


def _locate(root: Path, sample: Sample) -> Path:
    base = root / imagenet.CLS_LOC
    flat = base / f"{sample.place}.JPEG"
    return flat if flat.is_file() else base / sample.split / synset(sample.label) / flat.name


def list_members(root: Path, test_images: int = 8) -> Iterator[tuple[str, Path | bytes]]:
    """(member name, file or bytes) of everything below `ILSVRC/`, sorted by name; validation images flat, as served."""
    settings = Settings(**json.loads((root / MARKER).read_bytes())["settings"])
    members: dict[str, Path | bytes] = {}
    for part in ("Annotations", "ImageSets"):
        for path in (root / "ILSVRC" / part).rglob("*.*"):
            members[path.relative_to(root).as_posix()] = path
    for split in ("train", "val"):
        for sample in list_samples(settings, split):
            members[f"{imagenet.CLS_LOC}/{sample.place}.JPEG"] = _locate(root, sample)
    recipe = choose_recipe(settings)
    for number in range(1, test_images + 1):
        sample = Sample("test", number % settings.classes, number)
        members[f"{imagenet.CLS_LOC}/{sample.place}.JPEG"] = make_image(sample, recipe)[0]
    lines = (f"ILSVRC2012_test_{number:08d} {number}\n" for number in range(1, test_images + 1))
    members["ILSVRC/ImageSets/CLS-LOC/test.txt"] = "".join(lines).encode()
    return iter(sorted(members.items()))


def list_top(root: Path, test_images: int = 8) -> list[tuple[str, bytes]]:
    """(member name, bytes) of the lists beside `ILSVRC/`."""
    names = (imagenet.SYNSET_MAPPING, "LOC_train_solution.csv", imagenet.VAL_SOLUTION)
    top = [(name, (root / name).read_bytes()) for name in names]
    rows = "".join(f"ILSVRC2012_test_{number:08d},\n" for number in range(1, test_images + 1))
    return sorted([*top, ("LOC_sample_submission.csv", f"ImageId,PredictionString\n{rows}".encode())])


def _read(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def _write_tar(stream: IO[bytes], members: Iterator[tuple[str, Path | bytes]], advance: Callable[[], None]) -> int:
    number = 0
    with (
        gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, source in members:
            data = _read(source)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            number += 1
            advance()
    return number


def write_kaggle_zip(
    root: Path,
    path: Path,
    test_images: int = 8,
    nested: bool = False,
    compression: int = zipfile.ZIP_DEFLATED,
    quiet: bool = True,
) -> int:
    """Write the generated tree `root` as Kaggle's archive into `path`; the same tree gives the same bytes.

    Args:
        test_images: images below `test/`, generated here.
        nested: the images lie in `imagenet_object_localization_patched2019.tar.gz`, a member of the zip.
        compression: of the members, a constant of `zipfile`.

    Returns the number of members (those of the tar.gz, too).
    """
    number = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            Progress("Archiving", None, "members", quiet=quiet) as progress,
            atomic_open(path) as file,
            zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive,
        ):

            def info(name: str) -> zipfile.ZipInfo:
                entry = zipfile.ZipInfo(name, (2019, 12, 11, 0, 0, 0))
                entry.compress_type, entry.external_attr = compression, 0o644 << 16
                return entry

            members = list_members(root, test_images)
            if nested:
                with archive.open(info(NESTED), "w", force_zip64=True) as stream:
                    number += 1 + _write_tar(stream, members, progress.advance)
                members = iter(())
            for name, source in [*members, *list_top(root, test_images)]:
                archive.writestr(info(name), _read(source))
                number += 1
                progress.advance()
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror}); give another place") from error
    return number
