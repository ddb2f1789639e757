"""The ledger, `metrics.jsonl`: one JSON object a line, and the truth about a run.

Rows have a `kind`: "train" (one for each step, strictly rising, none twice, none missing), "eval" and "event". When a
run goes on from step k, the rows of later steps are taken out first: they will be written again.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a ledger; a last line that was cut by a crash is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def last_steps(path: Path) -> dict[str, int]:
    """Kind of row ("train", "eval") -> its last step in a ledger."""
    return {row["kind"]: row["step"] for row in read_rows(path) if row.get("kind") in ("train", "eval")}


def top1_of(row: dict) -> float:
    """Percent that an "eval" row's better network got: the weights, or their average where there is one."""
    return max(row.get("val_top1", -math.inf), row.get("val_ema_top1", -math.inf))


def best_step(evaluations: Iterable[dict]) -> int | None:
    """The step with the highest `top1_of` among "eval" rows, the earliest of equals; None without any."""
    best = max(evaluations, key=lambda row: (top1_of(row), -row["step"]), default=None)
    return None if best is None else best["step"]


def _finite(value):
    """JSON has no NaN or infinity: they become strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Ledger:
    """Appends rows to `metrics.jsonl`.

    Args:
        path: the file, made if missing.
        step: rows of training steps and evaluations after this many steps are removed first. The row of step s, the
            s-th from 1, says that s steps are done.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.file = None
        self.rewind(step)

    def rewind(self, step: int, *events: dict) -> None:
        """Take out the rows of steps after `step`, and add `events`: both or neither, and on the disk."""
        rows = list(read_rows(self.path))
        keep = [row for row in rows if row.get("kind") == "event" or row.get("step", 0) <= step]
        self.evaluations = [row for row in keep if row.get("kind") == "eval"]
        #: of the training rows in the file now
        self.losses = [row.get("loss") for row in keep if row.get("kind") == "train"]
        if len(keep) < len(rows) or events or self._torn():
            self._rewrite([*keep, *events])
        if self.file is not None:
            self.file.close()
        self.file = self.path.open("ab")

    def _torn(self) -> bool:
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def _rewrite(self, rows: list[dict]) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def append(self, row: dict) -> None:
        """Add a row; it is handed to the operating system at once."""
        self.file.write(json.dumps({key: _finite(value) for key, value in row.items()}).encode() + b"\n")
        self.file.flush()
        if row.get("kind") == "eval":
            self.evaluations.append(row)

    def sync(self) -> None:
        """Wait until every row is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()
