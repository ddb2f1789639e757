"""The logger `pipeline`, and the handler by which the command line shows its lines.

Importing the package attaches nothing, as the standard library has it: a script that calls `pipeline.train` decides by
`logging.basicConfig(level="INFO")` or handlers of its own what it shows. What a verb was asked for (a table, a path) is
printed by the verb and does not come here; the scores of an evaluation do, as `pipeline.evaluate` prints nothing.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from pipeline.redact import redact

#: INFO: progress; WARNING: what may need attention
logger = logging.getLogger("pipeline")


class HideCredentials(logging.Filter):
    """No handler, a script's own neither, gets a record of this logger with a credential in its message, or in the
    traceback that a formatter adds to it. A logger's filter does not see the records of those below it: the package
    has none."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = record.getMessage()
        except Exception:  # arguments that the format does not take, or a __str__ of theirs that fails
            text = f"{record.msg} (its arguments do not fit)"
        record.msg, record.args = redact(text), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        return True


logger.addFilter(HideCredentials())


class CommandLineHandler(logging.Handler):
    """One line of stdout for each record, a warning with "warning: " before it. bar: rich's, which has the terminal
    while it is shown; lines appear above it."""

    bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Raises BrokenPipeError where nobody reads any more."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stdout, flush=True)


def command_line_handler() -> CommandLineHandler | None:
    """The handler of this process, where it is a command line."""
    return next((one for one in logger.handlers if isinstance(one, CommandLineHandler)), None)


@contextlib.contextmanager
def shown_on_command_line() -> Iterator[None]:
    """Show the logger's lines while a verb runs."""
    if command_line_handler() is not None:
        yield
        return
    handler, level, propagate = CommandLineHandler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other packages attach handlers to the root, which would show each line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
