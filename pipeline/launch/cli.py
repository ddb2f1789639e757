"""The verb `launch`."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator

from pipeline.errors import EXIT_OK
from pipeline.files import keep_to_own_package
from pipeline.limits import available_cores

SAVE_AND_STOP = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """Meanwhile, a signal that asks this process to stop is appended to the list."""
    noted: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in SAVE_AND_STOP}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as by nohup
            signal.signal(number, lambda number, _: noted.append(signal.Signals(number)))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def main(argv: list[str]) -> int:
    """`pipeline launch`: the ranks of this node, as torchrun starts them; see docs/clusters.md."""
    with noted_signals() as signals:  # before torch is imported, which takes seconds
        return _launch(argv, signals)


def _launch(argv: list[str], signals: list[signal.Signals]) -> int:
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torch's own lines, over the one that a worker has printed
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pipeline.launch.options import parse

    options = parse(argv)
    if options.module == "pipeline":
        keep_to_own_package()
    if "OMP_NUM_THREADS" not in os.environ and options.nproc > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // options.nproc))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    if options.warm and not options.serve_store:
        from pipeline.launch.forked import warm_up

        with contextlib.suppress(OSError):  # TMPDIR's path is too long for a socket: ranks start as torchrun's do
            warm_up()
    from pipeline.launch.launcher import Launcher

    code = Launcher(options, signals).run()
    return EXIT_OK if code == EXIT_OK else code
