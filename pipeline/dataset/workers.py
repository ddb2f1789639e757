"""A process pool over a list of tasks: results in order, few tasks in flight, one clear error if a process dies."""

import functools
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import ClassVar, TypeVar

from pipeline.errors import TransientError, UserError
from pipeline.limits import MOST_CORES, available_cores

READERS = 8  #: files that a process reads at once

Task = TypeVar("Task")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Task], Result], items: Iterable[Task]) -> Iterator[Result]:
    """`read` of each item in order, some ahead by threads: hides the latency of cold disks and network file systems."""
    pending: deque = deque()
    for item in items:
        pending.append(_readers().submit(read, item))
        if len(pending) >= 2 * READERS:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="read")


class _WorkerProcess(SpawnProcess):
    """A new process that does not run the program's own file again, as Python's would: it needs nothing of it, and a
    script that is not guarded by `if __name__ == "__main__"` would start over in each."""

    _starting: ClassVar = threading.Lock()  # two threads may start workers

    def start(self) -> None:
        with self._starting:
            program = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")  # without a file
            try:
                super().start()
            finally:
                sys.modules["__main__"] = program


class _WorkerContext(SpawnContext):
    Process = _WorkerProcess


def _start_worker() -> None:
    """Ignore Ctrl-C, which the parent handles, and exit with the parent, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def map_in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int | None = None
) -> Iterator[Result]:
    """`function` (importable by name) of each task, in the tasks' order; at most 4 tasks a process are held at a time.

    With one process the tasks run in this process. Raises TransientError if a process is killed, UserError for a number
    that is impossible.
    """
    processes = processes or available_cores()
    if not 1 <= processes <= MOST_CORES:
        raise UserError(f"--processes is {processes}; give a number from 1 to {MOST_CORES:,}")
    if processes == 1:
        yield from map(function, tasks)
        return
    pending: deque = deque()
    pool = ProcessPoolExecutor(processes, mp_context=_WorkerContext(), initializer=_start_worker)
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) >= 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except (BrokenProcessPool, MemoryError) as error:
        raise TransientError("a worker process ran out of memory or was killed; run the same command again") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
