"""Where each rank is, and since when. A rank that hangs is named within `train.hang_timeout_s`, and the job ends.

The training thread says where it is (`Watchdog.phase`, `Watchdog.collective`); a second thread reports it to the other
ranks through torchrun's store, warns of long waits, and ends the process where nothing moves any more. A rank that
waits for others does not judge by its own clock alone: as long as one that is
behind shows signs of life, that one's limit counts. Time in which this process itself was stopped (`scontrol suspend`,
a paused virtual machine) is not counted: a thread that only sleeps detects it by waking late.
"""

import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_RETRY
from pipeline.redact import redact
from pipeline.training.ranks.flight_record import flight_record
from pipeline.training.ranks.launcher import current_launch

BEAT_S = 2.0  # between two signs of life
WARN_AFTER_S = 30.0  # of waiting, and again after twice as long
TICK_S = 0.25  # sleep of the thread that detects a suspended process
LATE_S = 0.5  # how late it must wake to count as suspended
_BEFORE_EXIT_S = 5.0  # for what is written before the process ends; the disk may be what hangs


@dataclass(frozen=True)
class Mark:
    """Where a rank is. `count`: collectives entered; `collective`: inside one; `age_s` in this place, of `limit_s`."""

    what: str
    step: int | None
    count: int
    collective: bool
    age_s: float
    limit_s: float


class Watchdog:
    """Watches over one rank; its thread runs from `start` to `close`.

    Args:
        rank, size: this process among all.
        names: of all ranks, for messages: "rank 3 (host n2, GPU 1, pid 77)".
        hang_timeout_s: seconds without progress after which a rank counts as hung.
        store: shared by all ranks (torch.distributed.Store); None: this process is alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, hang_timeout_s: float = math.inf, store: Any = None):
        self.rank, self.size, self.hang_timeout_s, self.store = rank, size, hang_timeout_s, store
        self.names = [f"rank {number}" for number in range(size)]
        self.detail: Callable[[], str] = lambda: ""  # more on where the training thread is: the file being read
        self.network_failed: Callable[[], bool] = lambda: False  # has NCCL reported an error on this rank?
        self.before_exit: Callable[[str], None] = lambda message: None  # called before the process is ended
        self.folder: Path | None = None  # where stacks and collectives are left
        self.step: int | None = None
        self.disconnected = False  # was contact to the other ranks lost?
        self.silent: list[int] = []  # ranks found dead
        self._mark = Mark("start-up", None, 0, False, 0.0, math.inf)
        self._ticked = time.monotonic()
        self._stopped_s = 0.0  # for which this process was stopped so far
        self._since = self._clock()
        self._warned = WARN_AFTER_S
        self._said: tuple[float, str] | None = None  # since when a wait that was warned of lasts, and where
        self._beats = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def _clock(self) -> float:
        """Seconds of a clock that stands still while this process is stopped."""
        return time.monotonic() - self._stopped_s

    # --- said by the training thread

    def phase(self, what: str, step: int | None = None, limit_s: float | None = None) -> None:
        """This rank now does `what`, for which it has `limit_s` seconds (default: hang_timeout_s)."""
        self.step = self.step if step is None else step
        self._enter(
            Mark(what, self.step, self._mark.count, False, 0.0, self.hang_timeout_s if limit_s is None else limit_s)
        )

    @contextlib.contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """All ranks do `what`; entered by all in the same order."""
        self._enter(Mark(what, self.step, self._mark.count + 1, True, 0.0, self.hang_timeout_s))
        try:
            yield
        finally:
            self.phase(f"what comes after {what}")

    def _enter(self, mark: Mark) -> None:
        self._mark, self._since = mark, self._clock()

    def start(self) -> None:
        """Begin to watch."""
        self._enter(replace(self._mark, limit_s=self.hang_timeout_s))
        self._post(self._here())
        self._ticked = time.monotonic()
        threading.Thread(target=self._tick, name="tick", daemon=True).start()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * BEAT_S)

    # --- the thread

    def _run(self) -> None:
        beat = min(BEAT_S, self.hang_timeout_s / 10)
        while not self._ended.wait(beat):
            self._await_tick()
            mark = self._here()
            self._say_if_long(mark)
            self._post(mark)
            stopped = self._stopped_s
            message = self._judge(mark, beat)
            self._await_tick()
            if stopped != self._stopped_s:
                continue  # what was seen of the others is out of date
            if message is not None and not self._ended.is_set() and not self._moved(mark):
                self._end(message, own=not mark.collective)

    def _tick(self) -> None:
        """Tell how long this process was stopped."""
        while not self._ended.wait(TICK_S):
            late = time.monotonic() - self._ticked - TICK_S
            if late > LATE_S:
                self._stopped_s += late
            self._ticked = time.monotonic()

    def _await_tick(self) -> None:
        """After a suspension the threads resume in any order: wait for the one that measures its length."""
        while time.monotonic() - self._ticked > TICK_S + LATE_S and not self._ended.is_set():
            time.sleep(TICK_S / 10)

    def _here(self) -> Mark:
        mark, since = self._mark, self._since
        return replace(mark, age_s=max(0.0, self._clock() - since))

    def _moved(self, mark: Mark) -> bool:
        return self._since > self._clock() - mark.age_s

    def _say_if_long(self, mark: Mark) -> None:
        """Warn of a long wait of this rank's own, and say when it is over."""
        if self._said is not None and self._said[0] != self._since:
            print(f"{self.names[self.rank]} continued after {self._clock() - self._said[0]:.0f} s", file=sys.stderr)
            self._said, self._warned = None, WARN_AFTER_S
        if not mark.collective and mark.age_s > self._warned and mark.limit_s < math.inf:
            self._said, self._warned = (self._since, mark.what), 2 * mark.age_s
            print(redact(f"warning: {self._sentence(self.rank, mark)}"), file=sys.stderr, flush=True)

    def _sentence(self, rank: int, mark: Mark) -> str:
        detail = self.detail() if rank == self.rank and not mark.collective else ""
        return f"{self.names[rank]} has been in {_place(mark)} for {mark.age_s:.0f} s{detail and ': '}{detail}"

    def _post(self, mark: Mark) -> None:
        """Tell the others."""
        if self.store is None:
            return
        self._beats += 1
        with contextlib.suppress(RuntimeError):  # the store's host is gone: torchrun will see to that
            self.store.set(f"at/{self.rank}", json.dumps([self._beats, asdict(mark)]))

    def _judge(self, mark: Mark, beat: float) -> str | None:
        """Is it over? Then the sentence that names who hangs."""
        waits = mark.collective and mark.age_s > 2 * beat
        if waits and (gone := self.first_failure()) is not None:
            return f"{gone}; the others can't go on"
        failed = waits and self.network_failed()
        if mark.age_s <= mark.limit_s and not failed:
            return None
        if not mark.collective or self.store is None:
            return f"{self._sentence(self.rank, mark)}; it counts as hung"
        marks, silent = self.look(3 * beat)
        if silent:
            self.silent = silent
            return f"{self._names(silent)} shows no sign of life, last seen in {_place(marks[silent[0]])}"
        if failed:
            return f"NCCL has reported an error in {_place(mark)}, and all ranks show signs of life: the network?"
        behind = [rank for rank, other in marks.items() if other.count < mark.count]
        if not behind:
            return f"all ranks have been in {_place(mark)} for {mark.age_s:.0f} s: the network?"
        slowest = max(behind, key=lambda rank: marks[rank].age_s)
        if marks[slowest].age_s < marks[slowest].limit_s + 10 * beat:
            return None  # it will end by its own limit, or go on
        return f"{self._sentence(slowest, marks[slowest])}; it counts as hung"

    def look(self, for_s: float) -> tuple[dict[int, Mark], list[int]]:
        """Where the other ranks are, and which of them give no sign of life for so many seconds."""
        first = self._read()
        for _ in range(3):
            self._ended.wait(for_s / 3)
            self._post(self._here())  # the others may be looking, too
        second = self._read()
        silent = [rank for rank, (beats, _) in second.items() if rank in first and first[rank][0] == beats]
        return {rank: mark for rank, (_, mark) in second.items()}, silent

    def _read(self) -> dict[int, tuple[int, Mark]]:
        found = {}
        with contextlib.suppress(RuntimeError):
            keys = {rank: f"at/{rank}" for rank in range(self.size) if rank != self.rank}
            there = {rank: key for rank, key in keys.items() if self.store.check([key])}
            values = self.store.multi_get(list(there.values())) if there else []
            for rank, value in zip(there, values, strict=True):
                beats, mark = json.loads(value)
                found[rank] = beats, Mark(**mark)
        return found

    # --- the end of a rank

    def announce_exit(self, message: str) -> bool:
        """Tell the others why this rank ends. True if it is the first to do so."""
        if self.store is None:
            return True
        mine = redact(f"{self.names[self.rank]} has ended: {message}")  # here: the key may be in this environment alone
        with contextlib.suppress(RuntimeError):
            return self.store.compare_set("gone", "", mine).decode() == mine
        return False

    def first_failure(self) -> str | None:
        """Which rank was the first to end, and why; None: nobody said so."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):
                if self.store.check(["gone"]):
                    return self.store.get("gone").decode()
        return None

    def reporter(self) -> int:
        """Which rank reports another's death: the first that is not missing itself."""
        return next((rank for rank in range(self.size) if rank not in self.silent), 0)

    def missing(self) -> str:
        """Contact was lost: a sentence on who is missing. Takes some seconds."""
        self.disconnected = True
        if self.store is None:
            return ""
        gone = self.first_failure()
        if gone is not None:
            return gone
        if current_launch() is not None:  # it knows at once, and starts the others again as soon as this rank ends
            return "pipeline launch names the one that is missing"
        marks, self.silent = self.look(3 * min(BEAT_S, self.hang_timeout_s / 10))
        silent = self.silent
        if silent:
            return f"{self._names(silent)} has died, last seen in {_place(marks[silent[0]])}"
        return self.first_failure() or "all ranks show signs of life: the network?"

    def _names(self, ranks: list[int]) -> str:
        more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
        return ", ".join(self.names[rank] for rank in ranks[:3]) + more

    def _end(self, message: str, own: bool) -> None:
        """End this process, whatever hangs in it."""
        report = threading.Thread(target=self._report, args=(message, own), daemon=True)
        report.start()
        report.join(_BEFORE_EXIT_S)
        os._exit(EXIT_RETRY)

    def _report(self, message: str, own: bool) -> None:
        if own:
            self.announce_exit(message)
        if own or self.rank == self.reporter():
            print(redact(f"pipeline train: {message}"), file=sys.stderr, flush=True)
        self.before_exit(message)
        self.dump()

    def dump(self) -> None:
        """Leave the stacks of all threads, and torch's record of the last collectives, in `folder`."""
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            with (self.folder / f"rank-{self.rank}-stacks.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
            record = flight_record()
            if record:
                (self.folder / f"rank-{self.rank}-collectives.json").write_bytes(record)


def _place(mark: Mark) -> str:
    return mark.what if mark.step is None else f"step {mark.step}, {mark.what}"
