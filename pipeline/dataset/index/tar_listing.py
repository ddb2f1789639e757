"""Which images a split in tar files holds, and their classes: WebDataset shards of others, and image-net.org's files.

Order and labels are those of the same images in class folders, so that the fingerprint is the same, too.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.dataset.index.left_out import Tally
from pipeline.dataset.index.listing import Listing, Places
from pipeline.dataset.index.tar_members import IMAGES, NO_LABEL, Member, Part, find_parts, walk
from pipeline.dataset.layouts.find import TarFiles
from pipeline.dataset.layouts.labels import EXPECTED, find_val_labels
from pipeline.dataset.workers import map_in_order
from pipeline.errors import TransientError, UserError

_FEW = 4  # tars, below which starting processes costs more than it saves


@dataclass(frozen=True)
class TarSplit:
    """The members of a split's files: (number of the file, member) of each; mtimes: as of `Listing`."""

    files: tuple[Path, ...]
    members: list[tuple[int, Member]]
    left_out: Tally
    mtimes: dict[str, int]


def list_tars(tars: dict[str, TarFiles], root: Path, processes: int) -> dict[str, Listing]:
    """The images of the splits that lie in tar files. processes: that walk them.

    Raises UserError for a tar that is cut, and for images whose classes nothing tells.
    """
    splits = {split: _walk_all(found, root, processes) for split, found in tars.items()}
    for split, found in tars.items():
        _label(splits[split], split, found.kind, root)
    return make_listings(splits, root, name_classes(splits))


def make_listings(splits: dict[str, TarSplit], root: Path, class_of: dict[str, str]) -> dict[str, Listing]:
    """Listings of splits whose members all have labels. class_of: label -> class."""
    return {split: _make_listing(of_split, root, class_of) for split, of_split in splits.items()}


def _walk_all(tars: TarFiles, root: Path, processes: int) -> TarSplit:
    numbers, parts, mtimes = [], [], {}
    try:
        for number, path in enumerate(tars.files):
            mtimes[os.path.relpath(path, root)] = path.stat().st_mtime_ns
            if tars.kind == "nested":
                own = find_parts(str(path))
            else:
                own = [Part(str(path), label=path.stem if tars.kind == "classes" else "")]
            parts += own
            numbers += [number] * len(own)
        members, left_out, suffixes = [], Tally(), set()
        for number, part, found in zip(
            numbers, parts, map_in_order(walk, parts, processes if len(parts) > _FEW else 1), strict=True
        ):
            if found.cut and tars.kind == "flat":
                raise UserError(f"{part.path} is cut (it has no end mark); get that file again")
            if found.cut:
                print(f"warning: {part.path} has no end mark: it may be cut", file=sys.stderr, flush=True)
            members += [(number, member) for member in found.members]
            suffixes |= found.suffixes
            of_root = os.path.relpath(part.path, root)
            for reason, of in found.left_out.reasons.items():
                left_out += Tally({reason: {"count": of["count"], "first": f"{of_root}:{of['first']}"}})
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"can't read {error.filename} ({error.strerror}); fix that or give another root") from error
    except OSError as error:
        raise TransientError(
            f"can't read {error.filename or tars.files[0].parent} ({error.strerror}); run the same command again"
        ) from error
    if not members:
        held = f" (but {', '.join(sorted(suffixes)[:5])})" if suffixes else ""
        raise UserError(
            f"{tars.files[0]} holds no image{held}; images must end in one of .{' .'.join(IMAGES)}: get that file "
            "again, or give another root"
        )
    return TarSplit(tars.files, members, left_out, mtimes)


def drop_unlabeled(split: TarSplit, root: Path) -> None:
    """Leave out the members without a label, in place, and count them."""
    for number, member in split.members:
        if not member.label:
            split.left_out.add(NO_LABEL, f"{os.path.relpath(split.files[number], root)}:{member.name}")
    split.members[:] = [(number, member) for number, member in split.members if member.label]


def _label(split: TarSplit, name: str, kind: str, root: Path) -> None:
    """Give every member a label, in place, from where the split's are; count those that have none."""
    members = split.members
    if any(member.label for _, member in members):
        drop_unlabeled(split, root)
        return
    listed = None if name == "train" else find_val_labels(root, split.files[0].parent)
    stems = [PurePosixPath(member.name).stem for _, member in members]
    if listed is not None and all(stem in listed.labels for stem in stems):
        split.mtimes[os.path.relpath(listed.source, root)] = listed.source.stat().st_mtime_ns
        labels = [listed.labels[stem] for stem in stems]
    elif kind == "flat":
        problem = f"no label in {listed.source}" if listed is not None else "no list of labels beside it"
        raise UserError(f"{split.files[0]} has {problem}; put {EXPECTED}, as image-net.org has it")
    elif all(member.folder for _, member in members):
        labels = [member.folder for _, member in members]
    elif all(member.hint for _, member in members):
        labels = [member.hint for _, member in members]
    else:
        first = members[0][1].name
        raise UserError(
            f"{split.files[0]} holds images without labels ({first}); expected a member .cls or .json beside each, "
            "class folders, or synsets in the names"
        )
    members[:] = [(number, m._replace(label=label)) for (number, m), label in zip(members, labels, strict=True)]


def name_classes(splits: dict[str, TarSplit], words: Sequence[str] = ()) -> dict[str, str]:
    """Label -> class. Numbers become the synsets that names or JSON tell of, where they do so of each, else `words`
    (names of the classes by number), else text of equal length, so that the order of classes stays theirs."""
    hints: dict[str, set[str]] = {}
    for _, member in itertools.chain.from_iterable(of_split.members for of_split in splits.values()):
        assert member.label is not None
        of_label = hints.setdefault(member.label, set())
        if member.hint:
            of_label.add(member.hint)
    if not all(label.isdecimal() for label in hints):
        wrong = next(
            (label for label in hints if "/" in label or not label.isprintable() or label[:1] in ("", ".")), None
        )
        if wrong is not None:
            raise UserError(f"a label is {wrong[:80]!r}, which can't be the name of a class; rename it")
        return {label: label for label in hints}
    known = {label: next(iter(found)) for label, found in hints.items() if len(found) == 1}
    same = {int(label) for label in hints}  # "7" and "07"
    if len(known) == len(hints) == len(same) == len(set(known.values())):
        return known
    if len(set(words)) == len(words) > max(same) and not any("/" in word or word[:1] in ("", ".") for word in words):
        return {label: words[int(label)] for label in hints}
    width = max(len(str(number)) for number in same)
    return {label: f"{int(label):0{width}d}" for label in hints}


def _make_listing(split: TarSplit, root: Path, class_of: dict[str, str]) -> Listing:
    rows = sorted(
        (class_of[member.label or ""], member.name, number, member.offset, member.size)
        for number, member in split.members
    )
    classes = sorted({row[0] for row in rows})
    label_of = {name: label for label, name in enumerate(classes)}
    shards = [os.path.relpath(path, root) for path in split.files]
    names = _unique([(row[1], shards[row[2]]) for row in rows])
    columns = {"shard": 2, "offset": 3, "size": 4}
    places = Places(shards, **{name: np.array([row[i] for row in rows], np.int64) for name, i in columns.items()})
    labels = np.array([label_of[row[0]] for row in rows], np.int32)
    return Listing(names, classes, labels, split.mtimes, split.left_out, places)


def _unique(named: list[tuple[str, str]]) -> list[str]:
    """Names of members; where several tars have the same one, with the tar's name in front, or a number."""
    seen: dict[str, int] = {}
    for name, _ in named:
        seen[name] = seen.get(name, 0) + 1
    names = [f"{shard}/{name}" if seen[name] > 1 else name for name, shard in named]
    again: dict[str, int] = {}
    for i, name in enumerate(names):
        count = again[name] = again.get(name, -1) + 1
        if count:
            folder, slash, file = name.rpartition("/")
            names[i] = f"{folder}{slash}{count}-{file}"
    return names
