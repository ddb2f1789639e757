"""The processes of a node's ranks in a round: started, watched, signaled and ended."""

import contextlib
import multiprocessing
import signal
import time

from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.numa.binding import NumaOptions

from pipeline.launch.forked import WarmContext, WarmHandler
from pipeline.launch.program import Program
from pipeline.training.ranks.stop_request import HELD_BACK

UNKILLABLE_S = 30.0  # a process that SIGKILL has not ended for so long hangs in the kernel: in a GPU's driver, say


class Workers:
    """The processes of a round.

    Args:
        program: what each runs.
        envs: local rank -> what is added to its environment.
        logs: where their output goes.
        name: role.
        prefixes: local rank -> before each line of output that is shown from a log file.
        numa: binding to the cores near each GPU.
    """

    def __init__(
        self,
        program: Program,
        envs: dict[int, dict[str, str]],
        logs: LogsSpecs,
        name: str = "default",
        prefixes: dict[int, str] | None = None,
        numa: NumaOptions | None = None,
    ):
        kind = SubprocessContext if program.module is None else WarmContext
        self._context = kind(
            name,
            program.entrypoint,
            dict.fromkeys(envs, program.arguments),
            envs,
            logs,
            log_line_prefixes=prefixes,
            numa_options=numa,
        )
        if isinstance(self._context, WarmContext):
            self._context.program = program
        held_back = HELD_BACK if program.asks_for_signals else ()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, held_back)  # new processes inherit it
        try:
            self._context._start()  # its `start` would install handlers of signals, too
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for tail in self._context._tail_logs:
            tail.start()
        self.exit_codes: dict[int, int] = {}  # in the order of their ends
        self._sent: dict[int, set[int]] = {}  # by rank, the signals that it got from here
        self._kill_at: float | None = None
        self._killed: float | None = None  # when SIGKILL was sent

    @property
    def unkillable(self) -> list[int]:
        """The ranks that SIGKILL has not ended in `UNKILLABLE_S`."""
        if self._killed is None or time.monotonic() - self._killed < UNKILLABLE_S:
            return []
        return [rank for rank in self._context.subprocess_handlers if rank not in self.exit_codes]

    def abandon(self) -> None:
        """Wait for none of those that run, now or when this process ends."""
        for handler in self._context.subprocess_handlers.values():
            if isinstance(handler, WarmHandler):
                multiprocessing.process._children.discard(handler.proc.process)  # type: ignore[attr-defined]

    @property
    def is_ending(self) -> bool:
        """Were the workers asked to end, and will be killed if they don't?"""
        return self._kill_at is not None

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return self._context.pids()

    def poll(self) -> bool:
        """Take note of those that have ended, and kill those whose time is over. Have all ended?"""
        handlers = self._context.subprocess_handlers
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self.signal(signal.SIGKILL)
            self._kill_at = None
        for rank, handler in handlers.items():
            if rank not in self.exit_codes:
                code = handler.proc.poll()
                if code is not None:
                    self.exit_codes[rank] = code
        return len(self.exit_codes) == len(handlers)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to those that run, each with the processes that it has started."""
        if number == signal.SIGKILL and self._killed is None:
            self._killed = time.monotonic()
        for rank, handler in self._context.subprocess_handlers.items():
            if rank not in self.exit_codes:
                self._sent.setdefault(rank, set()).add(number)
                with contextlib.suppress(ProcessLookupError):
                    handler.close(number)

    def was_stopped(self, rank: int) -> bool:
        """Did a signal from here end this worker?"""
        return -self.exit_codes.get(rank, 0) in self._sent.get(rank, ())

    def kill_after(self, seconds: float) -> None:
        """Kill those that still run so many seconds from now."""
        at = time.monotonic() + seconds
        self._kill_at = at if self._kill_at is None else min(at, self._kill_at)

    def close(self) -> None:
        """Kill those that run, and show the rest of their output."""
        self.signal(signal.SIGKILL)
        self._context.close(signal.SIGKILL, timeout=10)
