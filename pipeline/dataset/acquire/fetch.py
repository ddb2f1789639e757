"""The verb `fetch`: from a Kaggle account, or an archive that is already here, to a verified training set."""

import contextlib
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipeline.command import run_command, terminated_like_interrupted
from pipeline.counts import count
from pipeline.dataset.acquire import kaggle
from pipeline.dataset.acquire.access.backoff import Patience
from pipeline.dataset.acquire.access.remote import ArchiveChangedError, LocalFile, RemoteFile
from pipeline.dataset.acquire.acquisition import Acquisition, Options, unpacked_bytes
from pipeline.dataset.acquire.destination import check_kind, is_done, locked_root
from pipeline.dataset.acquire.manifest import ALL, Manifest, read_manifest
from pipeline.dataset.acquire.selection import SPLITS, Selection, parse_classes
from pipeline.dataset.acquire.sources import cifar10
from pipeline.dataset.acquire.sources.official import OfficialFiles, find_official, pack_official, unpack_official
from pipeline.dataset.acquire.tree import STATE, ExistingFiles, check_tree_space
from pipeline.dataset.acquire.zip_directory import ArchiveDamagedError, NotAnArchiveError
from pipeline.dataset.disk import explain
from pipeline.dataset.imagenet import CLS_LOC, SYNSET
from pipeline.dataset.index.index import PACKED, Index, index_folder, open_index
from pipeline.dataset.layouts.foreign import describe_contents
from pipeline.dataset.shards.plan import Options as PackOptions
from pipeline.dataset.shards.plan import parse_restart, spell_out_restart
from pipeline.dataset.shards.transcode import find_program
from pipeline.errors import EXIT_INTERRUPTED, TransientError, UserError

CHANGES = 3  # times that the archive may be replaced under one run


def fetch(
    dest: str,
    split: Literal["all", "train", "val"] = "all",
    classes: str | None = None,
    via: Literal["ranges", "zip"] = "ranges",
    from_file: str | None = None,
    pack: bool = False,
    shard_mb: int = 256,
    restart: Literal["auto"] | int | None = None,
    index: bool = True,
    competition: str = kaggle.COMPETITION,
    streams: int = 8,
    request_mb: float = 32.0,
    stall_s: float = 30.0,
    give_up_s: float = 900.0,
) -> int:
    """Download ImageNet from Kaggle into DEST, verified. Run the same command again to resume. For CIFAR-10:
    fetch cifar10 DEST.

    Args:
        dest: folder of the data set; requires space for the images and 5 % more.
        split: fetch both splits or one.
        classes: fetch a part: a number of classes (the first of the sorted synsets), or synsets like
            n01440764,n01443537.
        via: ranges reads the members straight from the server; zip downloads the whole archive first (requires twice
            the space), for servers without byte ranges.
        from_file: unpack this zip or tar.gz instead of downloading, or the folder with image-net.org's own tar files
            (also: --from FILE).
        pack: write the members straight into tar shards (as pipeline pack makes them), without a tree.
        shard_mb: megabytes of a shard.
        restart: with --pack, add restart markers as pipeline pack --restart does. MCUs a restart interval, or auto (8).
        index: decode every image and build the index at the end.
        competition: name of the Kaggle competition.
        streams: parallel connections.
        request_mb: most megabytes per request.
        stall_s: seconds without data after which a connection is dropped and retried.
        give_up_s: seconds without any progress after which the command stops.
    """
    if streams < 1 or request_mb <= 0 or stall_s <= 0 or give_up_s <= 0:
        raise UserError("streams, request_mb, stall_s and give_up_s must be greater than 0")
    selection = Selection(split, parse_classes(classes))
    if restart is not None and not pack:
        raise UserError("--restart is an option of shards; add --pack, or leave it out")
    packing = PackOptions(shard_mb=shard_mb, restart=parse_restart(restart)) if pack else None
    if restart is not None:
        find_program()
    options = Options(streams, max(1, int(request_mb * 1e6)), Patience(stall_s, give_up_s))
    root = Path(dest).absolute()
    manifest = Manifest(
        competition=None if from_file else competition, file=from_file and str(Path(from_file).absolute())
    )
    official = find_official(Path(from_file).absolute()) if from_file else None
    if official is not None:
        selection = official.select(selection)
    elif from_file and Path(from_file).is_dir():
        raise describe_contents(Path(from_file)) or UserError(
            f"--from {from_file} is a folder without the tar files of image-net.org; give an archive, or index the "
            f"folder: pipeline index {from_file}"
        )
    with terminated_like_interrupted(), locked_root(root):
        try:
            check_kind(root, packing)
            if not is_done(root, selection, index, packing):
                if official is None:
                    _fetch_until_complete(root, manifest, selection, options, via, packing)
                else:
                    _take_official(official, root, manifest, selection, packing)
                _finish(root, index)
        except KeyboardInterrupt:
            print("pipeline fetch: interrupted; run the same command again to resume", file=sys.stderr)
            return EXIT_INTERRUPTED
        except OSError as error:
            raise explain(error, error.filename or root) from error
    print(_describe(root, verified=official is None or (index and selection.split == "all")))
    return 0


def repair(root: Path, members: list[str], options: Options | None = None) -> None:
    """Fetch some members of a fetched data set again, from its source, and replace them.

    Args:
        root: the data root, with its `fetch.json`.
        members: names in the archive or paths relative to `root`, like `ILSVRC/Data/CLS-LOC/train/n.../n..._1.JPEG`.

    Raises UserError where the set was not fetched, or the archive does not have a member.
    """
    options, stop = options or Options(), threading.Event()
    manifest = read_manifest(root)
    if manifest is None:
        raise UserError(f"{root} was not fetched by this program (no fetch.json), so it has no source to repair from")
    if (root / PACKED).exists():
        raise UserError(f"{root} holds packed shards, which are not repaired by the image; remove them and fetch again")
    official = find_official(Path(manifest.file)) if manifest.file else None
    with locked_root(root):
        if official is not None:
            present = ExistingFiles(root)
            for found in filter(None, map(present.find, members)):
                (root / found[0]).unlink()
            unpack_official(official, root, manifest.to_selection())
            _sort_val(root)
            return
        selection = manifest.to_selection()
        with _opened(root, manifest, options, "ranges", stop, selection) as source:
            Acquisition(root, source, options, stop).repair(members, selection)
        _sort_val(root)


def _take_official(
    files: OfficialFiles, root: Path, manifest: Manifest, selection: Selection, packing: PackOptions | None
) -> None:
    earlier = read_manifest(root)
    if earlier is not None:
        manifest.selected, manifest.whole, manifest.images = earlier.selected, earlier.whole, earlier.images
    manifest.add(selection)
    manifest.write(root)
    if packing is None:
        unpack_official(files, root, selection)
    else:
        pack_official(files, root, selection, packing)


def _fetch_until_complete(
    root: Path, manifest: Manifest, selection: Selection, options: Options, via: str, packing: PackOptions | None
) -> None:
    """Fetch until the selection is complete, and record that; an archive that is replaced during it is reopened."""
    earlier = read_manifest(root)
    if earlier is not None:
        manifest.selected, manifest.whole, manifest.images = earlier.selected, earlier.whole, earlier.images

    def resolved(chosen: Selection) -> None:
        manifest.add(chosen)
        _refuse_leftovers(root, manifest, chosen)
        manifest.write(root)

    for left in range(CHANGES, -1, -1):
        try:
            stop = threading.Event()  # its own: threads left behind by an earlier try stay stopped
            with _opened(root, manifest, options, via, stop, selection) as source:
                Acquisition(root, source, options, stop, resolved).run(selection, packing)
            return
        except ArchiveChangedError as error:
            if not left:
                raise
            print(f"{error}: restarting with the new one; matching files are kept", file=sys.stderr)


def _refuse_leftovers(root: Path, manifest: Manifest, selection: Selection) -> None:
    """UserError where a part is asked for and an earlier fetch, of more classes, was stopped: its images would be
    indexed and trained on as well, as classes that are not whole."""
    for split in filter(selection.has, SPLITS):
        folder, chosen = root / CLS_LOC / split, manifest.selected[split]
        if chosen == ALL or not folder.is_dir():
            continue
        labels = selection.val_labels if split == "val" else {}
        found = {path.name if path.is_dir() else labels.get(path.stem, "") for path in folder.iterdir()}
        others = sorted(name for name in found - set(chosen) if SYNSET.fullmatch(name))
        if others:
            raise UserError(
                f"{folder} holds images of {count(len(others), 'other class')} ({', '.join(others[:3])}), of a fetch "
                "that was stopped; give another folder, remove them, or fetch all classes"
            )


@contextlib.contextmanager
def _opened(
    root: Path, manifest: Manifest, options: Options, via: str, stop: threading.Event, selection: Selection
) -> Iterator:
    """The archive as a source of byte ranges: a local file, the one behind Kaggle's address, or its download."""
    if manifest.file is not None:
        yield LocalFile(Path(manifest.file))
        return
    assert manifest.competition is not None
    client = kaggle.Kaggle(manifest.competition, options.patience, stop)
    if via == "ranges":
        yield RemoteFile(manifest.competition, client.sign, options.patience, stop)
        return
    folder = root / STATE / "download"
    folder.mkdir(exist_ok=True)
    size = client.sign().size
    have = sum(path.stat().st_size for path in folder.iterdir())
    check_tree_space(root, (size or 0) - have + unpacked_bytes(size or 0, selection))
    file = client.download(folder, size)
    try:
        yield LocalFile(file)
    except (ArchiveDamagedError, NotAnArchiveError) as error:
        shutil.rmtree(folder)
        raise TransientError(f"{error} (the download was removed; run the same command again)") from error
    shutil.rmtree(folder)


def _finish(root: Path, index: bool) -> None:
    """Sort the validation images and index the whole; UserError where an image does not decode."""
    _sort_val(root)
    manifest = _read_own_manifest(root)
    if (root / PACKED).exists():
        made: Index | None = open_index(index_folder(root))
    elif index and set(manifest.selected) == set(SPLITS):
        from pipeline.dataset.index.notes import read_unreadable
        from pipeline.dataset.index.scan import build_index

        made = build_index(root, by_fetch=True)
        bad = [entry["file"] for entries in read_unreadable(made.folder).values() for entry in entries]
        if bad:
            raise UserError(
                f"{root} is complete, but {count(len(bad), 'image')} can't be decoded, as in the archive "
                f"({', '.join(bad[:3])}); left out of the index; run pipeline verify {root}"
            )
    else:
        made = None
        manifest.images = {split: sum(1 for _ in (root / CLS_LOC / split).glob("*/*")) for split in manifest.selected}
    if made is not None:
        manifest.images = {split: len(of_split) for split, of_split in made.splits.items()}
    manifest.whole = manifest.selected
    manifest.write(root)


def _sort_val(root: Path) -> None:
    if (root / CLS_LOC / "val").is_dir():
        from pipeline.dataset.valprep import sort_val

        sort_val(root, quiet=False)


def _read_own_manifest(root: Path) -> Manifest:
    """The manifest that this run has written."""
    manifest = read_manifest(root)
    assert manifest is not None
    return manifest


def _describe(root: Path, verified: bool) -> str:
    manifest = _read_own_manifest(root)
    counts = " and ".join(f"{manifest.images[split]:,} {split}" for split in SPLITS if split in manifest.images)
    classes = {len(chosen) for chosen in manifest.whole.values() if chosen != ALL}
    part = f" of {count(max(classes), 'class')}" if classes else ""
    return f"{root}: complete{' and verified' if verified else ''}: {counts} images{part}"


def main(argv: list[str]) -> int:
    if argv[:1] == ["cifar10"]:
        return cifar10.main(argv[1:])
    return run_command(fetch, "fetch", spell_out_restart(cifar10.spell_out_from(argv)))
