"""The two ways a command can fail, and the exit codes by which a scheduler distinguishes them.

`UserError` is something that the user can fix: one line that names the thing, the value and the remedy.
`TransientError` is something that broke underneath (a node, a disk, a server): trying again may help.
"""

import sys

from pipeline.rank_env import own_rank
from pipeline.redact import redact

EXIT_OK = 0  #: finished; or nothing was left to do
EXIT_RETRY = 1  #: a node, a disk, a server or a program failed: trying again may help
EXIT_USER = 2  #: an option, a path or a data set must be fixed first: trying again does not help
EXIT_INTERRUPTED = 75  #: stopped by a signal after saving; run the same command to resume (EX_TEMPFAIL)
EXIT_GPU_FAULT = 71  #: a GPU failed: trying again may help, but not on this node (EX_OSERR)
EXIT_NODE_LOST = 69  #: too few nodes are left, or came: start the job again (EX_UNAVAILABLE); `pipeline launch`
EXIT_STORE_LOST = 68  #: the host of the rendezvous is gone: start the job again (EX_NOHOST); `pipeline launch`
EXIT_REGROUP = 76  #: saved for a change of membership; said by a worker to `pipeline launch`, never by that


#: verbs that several ranks run together
_BY_RANKS = ("pipeline train", "pipeline continue", "pipeline evaluate", "pipeline bench")


class UserError(ValueError):
    """What the user asked for can't be done; the message is one line with thing, value and remedy.

    `on_all_ranks`: every rank of a job meets the same error, so only rank 0 prints it.
    """

    on_all_ranks = True


class TransientError(RuntimeError):
    """Something underneath failed; the message is one line that names it. Trying again may help.

    `on_all_ranks`: every rank of a job meets the same error, so only rank 0 prints it.
    """

    def __init__(self, message: str, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class GpuFault(TransientError):
    """A GPU, or its link, failed as only another one can fix."""


def permission_problem(error: PermissionError) -> UserError:
    """One line on a file or folder that this account may not enter, read or write."""
    where = error.filename or "a file or folder"
    return UserError(f"{where}: {error.strerror} for this account; ask its owner for access, or give another path")


def exit_code_of(error: UserError | TransientError) -> int:
    """The exit code that an error asks for."""
    if isinstance(error, UserError):
        return EXIT_USER
    return EXIT_GPU_FAULT if isinstance(error, GpuFault) else EXIT_RETRY


def complain(who: str, error: UserError | TransientError | str) -> None:
    """Print the one line on stderr, once a job where all ranks would say the same."""
    rank = str(own_rank()) if who in _BY_RANKS else "0"
    own = not isinstance(error, str) and not error.on_all_ranks
    if rank == "0" or own:
        line = redact(f"{who}: {f'rank {rank}: ' if own and rank != '0' else ''}{error}")
        print(line, file=sys.stderr, flush=True)
