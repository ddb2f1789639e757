"""The files of image-net.org itself, unpacked into the tree that Kaggle's archive makes.

`ILSVRC2012_img_train.tar` is a tar of one tar a class; `ILSVRC2012_img_val.tar` holds the validation images flat, and
`ILSVRC2012_devkit_t12.tar.gz` their labels. An image that is in the tree already, with its size, is not written again.
"""

import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.counts import count
from pipeline.dataset.acquire.selection import BASE, Selection
from pipeline.dataset.acquire.tarball import read_member
from pipeline.dataset.acquire.tree import STATE, ExistingFiles, TreeWriter, check_tree_space
from pipeline.dataset.disk import explain_read
from pipeline.dataset.imagenet import SYNSET
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.index.tar_members import iter_members, lacks_end
from pipeline.dataset.layouts import devkit
from pipeline.dataset.layouts.find import OFFICIAL
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.errors import TransientError, UserError, permission_problem
from pipeline.files import atomic_write
from pipeline.progress import Progress

KIT_FOLDER = "ILSVRC2012_devkit_t12/data"
UNPACKED = 1.01  # bytes on disk for each byte of a tar, with what the file system adds
PAGE = "https://image-net.org/download-images"


@dataclass(frozen=True)
class OfficialFiles:
    """The tar file of each split that is there, and the kit with the labels (None: not there)."""

    tars: dict[str, Path]
    kit: devkit.Devkit | None

    def select(self, selection: Selection) -> Selection:
        """`selection`, narrowed to the splits that are there. UserError where that is none, or can't be unpacked."""
        if selection.classes is not None:
            raise UserError("--classes: the tar files of image-net.org are unpacked whole; leave the option out")
        splits = [split for split in self.tars if selection.has(split)]
        if not splits:
            raise UserError(f"{OFFICIAL[selection.split]} of image-net.org is not there; download it from {PAGE}")
        if "val" in splits:
            if self.kit is None:
                raise UserError(
                    f"{self.tars['val']} has no labels beside it; put ILSVRC2012_devkit_t12.tar.gz of image-net.org "
                    "into the same folder"
                )
            self.kit.read_labels()
        return Selection("all" if len(splits) == 2 else splits[0])


def find_official(source: Path) -> OfficialFiles | None:
    """The official files that `source` is (a tar file) or holds (a folder); None where it is something else.

    Raises UserError for the development kit alone.
    """
    if devkit.ARCHIVE.fullmatch(source.name) and source.is_file():
        raise UserError(
            f"{source} is the official development kit of image-net.org, which holds labels and no images; put "
            f"{OFFICIAL['train']} and {OFFICIAL['val']} beside it, then: pipeline fetch DEST --from {source.parent}"
        )
    if source.is_dir():
        tars = {split: source / name for split, name in OFFICIAL.items() if (source / name).is_file()}
        folder = source
    else:
        tars = {split: source for split, name in OFFICIAL.items() if source.name == name and source.is_file()}
        folder = source.parent
    return OfficialFiles(tars, devkit.find_devkit([folder])) if tars else None


def unpack_official(files: OfficialFiles, root: Path, selection: Selection) -> None:
    """Unpack the splits of `selection` into the tree of `root`; the labels go along with the validation images.

    Raises UserError for a tar that holds something else, or a disk that is too small; TransientError for a cut one.
    """
    tars = {split: path for split, path in files.tars.items() if selection.has(split)}
    total = sum(path.stat().st_size for path in tars.values())
    present, writer = ExistingFiles(root), TreeWriter(root)
    check_tree_space(root, total * UNPACKED)
    if "val" in tars:
        assert files.kit is not None
        (root / KIT_FOLDER).mkdir(parents=True, exist_ok=True)
        for name, data in files.kit.files.items():
            atomic_write(root / KIT_FOLDER / name, data)
    for path in tars.values():
        try:
            path.open("rb").close()
        except PermissionError as error:
            raise permission_problem(error) from error
    with Progress("Unpacking", total, "bytes") as progress:
        for split, path in tars.items():
            try:
                with tarfile.open(path, "r:") as tar:
                    for number, (name, opened, info) in enumerate(_images(path, tar, split)):
                        found = present.find(name)
                        if found is None or found[1] != info.size:
                            writer.write(0, number, name, _read(path, opened, info))
                        progress.advance(info.size)
                    if lacks_end(tar.fileobj, tar.offset):
                        raise tarfile.ReadError("no end mark")
            except (tarfile.TarError, EOFError) as error:
                raise TransientError(f"{path} is cut or damaged ({error}); download it again from {PAGE}") from error
            except OSError as error:
                raise explain_read(error, path) from error


def pack_official(files: OfficialFiles, root: Path, selection: Selection, options: Options) -> None:
    """Write both splits straight into tar shards in `root`, the very ones that `pack` writes from the unpacked tree.

    The tar files are indexed in place for that, in the state folder of `root`. Raises UserError where one of them is
    missing or an image does not decode.
    """
    if selection.split != "all":
        lost = next(name for split, name in OFFICIAL.items() if split not in files.tars or not selection.has(split))
        raise UserError(f"--pack requires both tar files of image-net.org: {lost} is not there, or was not asked for")
    source, folder = files.tars["train"].parent, root / STATE / "source-index"
    build_index(source, folder)
    bad = [entry["file"] for entries in read_unreadable(folder).values() for entry in entries]
    if bad:
        raise UserError(
            f"{count(len(bad), 'image')} of {source} can't be decoded ({', '.join(bad[:3])}); run: "
            f"pipeline pack {source} DEST --unreadable skip"
        )
    pack_tree(source, root, options, quiet=False, source_index=folder)
    shutil.rmtree(folder)


def _read(path: Path, tar: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    """`read_member`; what the disk of the tar file says is not taken for an error of writing."""
    try:
        yield from read_member(tar, info)
    except OSError as error:
        raise explain_read(error, path) from error


def _images(path: Path, tar: tarfile.TarFile, split: str) -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]:
    """(name in the tree, the tar that holds it, its header there) of each image, in the order of the file."""
    for info in _members(path, tar):
        if split == "val":
            yield f"{BASE}/val/{info.name}", tar, info
            continue
        synset, _, suffix = info.name.rpartition(".")
        if suffix != "tar" or not SYNSET.fullmatch(synset):
            raise UserError(f"{path} holds {info.name!r}, where a tar of a class was expected: archive refused")
        with tarfile.open(fileobj=tar.extractfile(info), mode="r:") as inner:
            for image in _members(path, inner):
                yield f"{BASE}/train/{synset}/{image.name}", inner, image


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar; UserError for anything else, and for a name that is more than a file's name."""
    for info in iter_members(tar):
        if info.isdir():
            continue
        if not info.isreg() or "/" in info.name or info.name.startswith(".") or not info.name.isprintable():
            raise UserError(f"{path} holds {info.name!r}, which is not a regular file: archive refused")
        yield info
