"""Workers forked from a process with all imports done, in place of new interpreters, by torch's own names."""

import contextlib
import ctypes
import inspect
import multiprocessing
import os
import runpy
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.numa.binding import NumaOptions

from pipeline.launch.program import Program
from pipeline.limits import available_cores
from pipeline.training.ranks.stop_request import HELD_BACK, OUTLIVED

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
PRELOADED = ["pipeline.launch.preload"]  # by the process that workers are forked from
#: Libraries start as many threads when they are imported. A process with threads can't be forked safely.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def warm_up() -> None:
    """Start the process that workers are forked from, if there is none; it imports in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    given = {name: os.environ[name] for name in _THREADS if name in os.environ}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        forkserver.ensure_running()
    finally:
        for name in _THREADS:
            del os.environ[name]
        os.environ.update(given)


def _use_threads(given: dict[str, str]) -> None:
    """As many threads as a new interpreter would have. given: the launcher's settings of `_THREADS`."""
    import torch

    for name in _THREADS:
        os.environ.pop(name, None)
    os.environ.update(given)
    number = given.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(number) if number.isdecimal() and int(number) > 0 else available_cores())


class _WarmProcess:
    """A forked process, by the names of subprocess.Popen."""

    def __init__(self, process: Any):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode


class WarmHandler(SubprocessHandler):
    """A handler of a process that is there already."""

    def __init__(self, process: Any):
        self.proc: Any = _WarmProcess(process)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        death_sig = death_sig or signal.SIGTERM
        try:
            os.killpg(self.proc.pid, death_sig)
        except ProcessLookupError:  # it leads no group yet
            os.kill(self.proc.pid, death_sig)


class WarmContext(SubprocessContext):
    program: Program

    def _start(self) -> None:
        with contextlib.suppress(OSError):
            warm_up()  # again, where the process to fork from has died since
        context = multiprocessing.get_context("forkserver")
        threads = {name: os.environ[name] for name in _THREADS if name in os.environ}
        for rank in range(self.nprocs):
            arguments = (
                self.program,
                {**threads, **self.envs[rank]},
                self.stdouts[rank] or "",
                self.stderrs[rank] or "",
                rank,
                self._numa_options,
            )
            process = context.Process(target=run_forked, args=arguments, daemon=False)
            try:
                process.start()
            except (EOFError, OSError):  # the process to fork from has ended, and said why
                for handler in self.subprocess_handlers.values():
                    handler.close(signal.SIGKILL)
                self.subprocess_handlers.clear()
                super()._start()
                return
            self.subprocess_handlers[rank] = WarmHandler(process)


def run_forked(
    program: Program, env: dict[str, str], stdout: str, stderr: str, local_rank: int, numa: NumaOptions | None
) -> None:
    """A forked worker's life: as `python -m MODULE ARGV ...` with `env`. Never returns."""
    parent = os.getppid()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
    os.setsid()
    if not program.asks_for_signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
        for number in OUTLIVED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _forget_forkserver()
    _show_command([program.entrypoint, *program.arguments])
    _redirect(sys.stdout, stdout)
    _redirect(sys.stderr, stderr)
    os.environ.update(env)
    if numa is not None:
        _bind(local_rank, numa)
    _use_threads({name: env[name] for name in _THREADS if name in env})  # of the cores that it is bound to
    assert program.module is not None
    sys.modules.pop(f"{program.module}.__main__", None)  # of the launcher: it is run again here
    sys.argv = [program.module, *program.argv]
    code: Any = 0
    try:
        runpy.run_module(program.module, run_name="__main__", alter_sys=True)
    except SystemExit as asked:
        code = asked.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _bind(local_rank: int, numa: NumaOptions) -> None:
    """Bind this process to the cores beside its GPU."""
    from torch.numa import binding

    bind: Any = binding._maybe_apply_numa_binding_to_current_process
    name = "gpu_index" if "gpu_index" in inspect.signature(bind).parameters else "device_index"  # torch 2.11; later
    bind(**{name: local_rank}, numa_options=numa)


def _show_command(command: list[str]) -> None:
    """Have ps, top and pkill -f see this command line, rather than that of the process this one was forked from; cut to
    the room there is (Linux)."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: proc(5)
        if end > begin > 0:
            text = "\0".join(command).encode()[: end - begin - 1]
            ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def _forget_forkserver() -> None:
    """Let go of the pipe that keeps the process alive that this one was forked from: it ends with the launcher."""
    known: Any = forkserver._forkserver
    if known._forkserver_alive_fd is not None:
        os.close(known._forkserver_alive_fd)
    known._forkserver_alive_fd = known._forkserver_address = known._forkserver_pid = None


def _redirect(stream: IO[str], path: str) -> None:
    if path:
        with open(path, "wb") as file:  # noqa: PTH123
            os.dup2(file.fileno(), stream.fileno())
