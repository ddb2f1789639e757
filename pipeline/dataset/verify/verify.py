"""The verb `verify`: is this data set complete and correct? Missing and damaged images are named.

Two references: the archive's own lists (which images), and the index (which bytes).
"""

import json as json_format
from pathlib import Path

import numpy as np
import xxhash

from pipeline.command import run_command
from pipeline.counts import count
from pipeline.dataset import imagenet
from pipeline.dataset.index.index import PACKED, Index, has_index, index_folder, open_sound
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.verify.check import MISSING, Finding, NamedSample, check_items
from pipeline.dataset.verify.expected import hash_ids, read_expected, train_id
from pipeline.dataset.verify.report import Report, SplitCounts, judge, show, to_json
from pipeline.dataset.verify.samples import find_splits, name_samples
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.limits import available_cores
from pipeline.progress import Progress


def open_baseline(root: Path, folder: Path | None = None) -> tuple[Path, Index | None]:
    """The data root that `root` means (see `find_layout`), and its index, in `folder` or by default in one of both, its
    own content checked; None where there is none. UserError where it is damaged, or of another root."""
    folder = folder or index_folder(root)
    if not has_index(folder):
        if (root / PACKED).exists():
            raise UserError(f"{root} holds packed shards without an index; run the same pack command again")
        root = find_splits(root).root
        folder = index_folder(root)
        if not has_index(folder):
            return root, None
    index = open_sound(folder)
    if not _is_same(index.root, root) and not _is_same(index.root, find_splits(root).root):
        raise UserError(f"index {folder} is of {index.root}, not of {root}; run: pipeline index {root} --out DIR")
    return index.root, index


def _is_same(one: Path, other: Path) -> bool:
    return one.is_dir() and one.samefile(other)


def _image_id(named: NamedSample) -> str:
    return train_id(named.synset, named.stem) if named.split == "train" else named.stem


def _problem(named: NamedSample, finding: Finding) -> NamedSample:
    return NamedSample(named.split, named.name, named.synset, named.stem, finding.problem)


def _list_missing(report: Report, split: str, counted: SplitCounts, lost: list[NamedSample]) -> None:
    """Add what the lists (or, where there is none, the index) name and the root lacks, and what no list names."""
    expected = report.expected
    if split not in expected.counts:
        report.missing += lost
        return
    here = np.sort(np.array(counted.ids, np.uint64))
    listed = hash_ids(expected.ids(split))
    absent = set(np.flatnonzero(~np.isin(listed, here)).tolist())
    for number, name in enumerate(expected.ids(split)):
        if number in absent:
            synset = expected.val_labels[name] if split == "val" else name.partition("/")[0]
            path = f"{imagenet.CLS_LOC}/{split}/{name}.JPEG"
            report.missing.append(NamedSample(split, path, synset, name.rpartition("/")[2], MISSING))
    wanted = set(listed.tolist())
    report.missing += (named for named in lost if int(hash_ids([_image_id(named)])[0]) not in wanted)


def verify_root(
    root: Path,
    decode: bool = False,
    processes: int | None = None,
    quiet: bool = True,
    before: Report | None = None,
    index: Path | None = None,
) -> Report:
    """Look at everything in `root`.

    Args:
        root: a data root, as a tree or as packed shards.
        decode: decode every image again; else a digest that agrees with the index proves an image.
        processes: default: every core that this process may use.
        before: a report after which only what it found broken was fetched again: the rest is not read twice.
        index: folder of its index; default `ROOT/index`.

    Raises UserError where there is no data set, or where its index or lists are damaged.
    """
    root = root.resolve()
    if not root.is_dir():
        raise UserError(
            f"data root {root} does not exist or is not a folder; give the folder that holds train/ and val/"
        )
    processes = processes or available_cores()
    root, opened = open_baseline(root, index)
    report = Report(root, read_expected(root), opened)
    listed = {split: set(hash_ids(report.expected.ids(split)).tolist()) for split in report.expected.counts}
    again = None if before is None else {(named.split, named.stem) for named in before.broken()}
    counts_of: dict[str, SplitCounts] = {}
    lost: dict[str, list[NamedSample]] = {}

    def take(named: NamedSample, finding: Finding | None) -> None:
        if finding is not None and finding.problem == MISSING:
            lost.setdefault(named.split, []).append(_problem(named, finding))
            return
        counted = counts_of.setdefault(named.split, SplitCounts())
        key = xxhash.xxh3_64_intdigest(_image_id(named).encode())
        counted.ids.append(key)
        if named.split in listed and key not in listed[named.split]:
            report.unlisted.append(named)
        truth = report.expected.val_labels.get(named.stem) if named.split == "val" else None
        if truth is not None and truth != named.synset:
            report.mislabeled.append(_problem(named, Finding(f"lies in {named.synset}, belongs to {truth}")))
        if finding is not None and finding.problem:
            report.damaged.append(_problem(named, finding))
            return
        counted.sound += 1
        counted.of_class[named.synset] += 1
        if finding is not None:
            report.kinds[finding.kind] += 1
            report.known += finding.kind == "png" and named.stem in imagenet.KNOWN_PNG
            report.known += finding.kind == "cmyk" and named.stem in imagenet.KNOWN_CMYK

    number, items = name_samples(root, report.index, processes)
    if again is not None:
        broken = []
        for named, item in items:
            if (named.split, named.stem) in again:
                broken.append((named, item))
            else:
                take(named, None)
        number, items = len(broken), iter(broken)
    with Progress("Verifying", number, "images", quiet=quiet) as progress:
        for named, finding in check_items(items, decode, processes, progress.advance):
            take(named, finding)
    if before is not None:
        report.kinds += before.kinds
        report.known += before.known
    for split in sorted({*counts_of, *lost, *report.expected.counts}):
        _list_missing(report, split, counts_of.get(split, SplitCounts()), lost.get(split, []))
    judge(report, counts_of)
    return report


def repair_root(report: Report, decode: bool, processes: int | None, quiet: bool) -> Report:
    """Fetch what is missing or damaged again, index it, and look once more at just that.

    Raises UserError for packed shards, and where the root was not fetched by `pipeline fetch`.
    """
    if report.packed and report.index is not None:
        split = report.index.splits
        of = {(name, split[name].name(i)): split[name].path(i).name for name in split for i in range(len(split[name]))}
        shards = sorted({of.get((n.split, n.name), n.name.partition(":")[0]) for n in report.broken()})
        remedy = "run the same pack command again" if report.index.is_packed else "get these files again"
        raise UserError(
            f"{report.root} holds shards, which are not repaired one image at a time: remove {', '.join(shards[:5])} "
            f"and {remedy}"
        )
    from pipeline.dataset import valprep
    from pipeline.dataset.acquire import fetch

    def member(named: NamedSample) -> str:
        inner = f"{named.synset}/{named.stem}" if named.split == "train" else named.stem
        return f"{imagenet.CLS_LOC}/{named.split}/{inner}.JPEG"

    if report.broken():
        fetch.repair(report.root, sorted({member(named) for named in report.broken()}))
    if report.mislabeled:
        valprep.sort_val(report.root)
    if report.index is not None:
        build_index(report.root, report.index.folder, processes, by_fetch=True)
    folder = report.index.folder if report.index is not None else None
    return verify_root(report.root, decode, processes, quiet, before=report, index=folder)


def verify(
    root: str,
    json: str | None = None,
    repair: bool = False,
    decode: bool = False,
    processes: int | None = None,
    index: str | None = None,
) -> int:
    """Is this data set complete and correct? Counts, classes, labels and every image's bytes; exit code 0 if so.

    Args:
        root: a data root: a tree or packed shards.
        json: also write the report, with every name, to this file.
        repair: fetch what is missing or damaged again.
        decode: decode every image again, even where its bytes are those that were decoded when indexed.
        processes: number of processes; default: all cores.
        index: folder of the index; default ROOT/index.
    """
    folder = Path(index).expanduser() if index else None
    if folder is not None and not has_index(folder):
        raise UserError(f"--index {folder} holds no index; build one with: pipeline index {root} --out {folder}")
    report = verify_root(Path(root), decode, processes, quiet=False, index=folder)
    show(report)
    if repair and (report.broken() or report.mislabeled):
        number = len(report.broken()) + len(report.mislabeled)
        print(f"repairing {count(number, 'image')}")
        report = repair_root(report, decode, processes, quiet=False)
        show(report)
    if json is not None:
        try:
            Path(json).write_text(json_format.dumps(to_json(report), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"can't write {json} ({error.strerror}); give another path") from error
    return EXIT_OK if report.good else EXIT_USER


def main(argv: list[str]) -> int:
    return run_command(verify, "verify", argv)
