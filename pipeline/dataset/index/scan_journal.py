"""What an unfinished or an earlier scan found, so that no unchanged file is read again."""

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
        self.file.close()
        if remove:
            self.path.unlink(missing_ok=True)


class PreviousScan:
    """Results of an earlier index and of a killed scan, for files whose size and time have not changed."""

    def __init__(self, index: Index | None, split: str, journal: ScanJournal):
        self.journal = journal.seen
        self.split = index.splits.get(split) if index else None
        self.numbers = {name: i for i, name in enumerate(self.split.iter_names())} if self.split else {}

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
