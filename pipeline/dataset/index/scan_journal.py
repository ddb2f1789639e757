"""What an unfinished or an earlier scan found, so that no unchanged file is read again."""

import contextlib
import json
import os
from pathlib import Path

from pipeline.dataset.index.decode import ScannedFile
from pipeline.dataset.index.index import Index


class ScanJournal:
    """Results of a scan, by file, so that a killed scan resumes; a half-written last line is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.seen: dict[str, ScannedFile] = {}
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    try:
                        name, *fields = json.loads(line)
                        self.seen[name] = ScannedFile(*fields)
                    except (ValueError, TypeError):
                        break
                    whole += len(line)
        self.file = path.open("ab")
        self.file.truncate(whole)

    def add(self, names: list[str], found: list[ScannedFile]) -> None:
        lines = (json.dumps([name, *seen]) + "\n" for name, seen in zip(names, found, strict=True))
        self.file.write("".join(lines).encode())
        self.file.flush()

    def close(self, remove: bool) -> None:
        with contextlib.suppress(OSError):  # on a full disk what is left in its buffer finds no space either
            self.file.close()
        if remove:
            self.path.unlink(missing_ok=True)


def member_key(shard: str, offset: int) -> str:
    """What the journal calls an image in a tar file."""
    return f"{shard}:{offset}"


class PreviousScan:
    """Results of an earlier index and of a killed scan, for files whose size and time have not changed."""

    def __init__(self, index: Index | None, split: str, journal: ScanJournal):
        self.journal = journal.seen
        self.split = index.splits.get(split) if index else None
        in_tars = self.split is not None and bool(self.split.shards)
        self.numbers = {name: i for i, name in enumerate(self.split.iter_names())} if self.split and not in_tars else {}
        self.mtimes = index.folders if index else {}
        self.members: dict[tuple[str, int], int] = {}
        if self.split is not None and in_tars:
            of = (self.split.records[name].tolist() for name in ("shard", "offset"))
            self.members = {(self.split.shards[shard], at): i for i, (shard, at) in enumerate(zip(*of, strict=True))}

    def find_member(self, shard: str, offset: int, size: int, mtime_ns: int) -> ScannedFile | None:
        """As `find`, of an image in a tar file. size: 0 where only a look at it tells; mtime_ns: of the tar file, as it
        is now."""
        i = self.members.get((shard, offset))
        if i is not None and self.mtimes.get(shard) == mtime_ns:
            assert self.split is not None
            known, digest, width, height = (
                int(self.split.records[key][i]) for key in ("size", "digest", "width", "height")
            )
            if size in (0, known):
                return ScannedFile(known, mtime_ns, digest, width, height)
        seen = self.journal.get(member_key(shard, offset))
        return seen if seen is not None and size in (0, seen.size) and seen.mtime_ns == mtime_ns else None

    def find(self, root: Path, name: str) -> ScannedFile | None:
        seen = self.journal.get(name)
        if self.split is not None and name in self.numbers:
            record = self.split.records[self.numbers[name]]
            size, mtime_ns, digest, width, height = (
                int(record[key]) for key in ("size", "mtime_ns", "digest", "width", "height")
            )
            seen = ScannedFile(size, mtime_ns, digest, width, height)
        if seen is None:
            return None
        try:
            stat = os.stat(f"{root}/{name}")
        except OSError:
            return None
        return seen if (stat.st_size, stat.st_mtime_ns) == (seen.size, seen.mtime_ns) else None
