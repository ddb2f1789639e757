"""The front door: one verb, one function. No logic lives here, and nothing heavy is imported before its verb."""

import atexit
import contextlib
import gc
import importlib
import os
import select
import signal
import sys
import threading
import traceback
from typing import Any

from pipeline import __version__
from pipeline.command import close_to, verb_page
from pipeline.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RETRY,
    EXIT_USER,
    TransientError,
    UserError,
    complain,
    exit_code_of,
    permission_problem,
)
from pipeline.files import PASSING, give_home, keep_to_own_package
from pipeline.logs import shown_on_command_line
from pipeline.output import failure_of_stdout, prepare_output, unfailing_output
from pipeline.rank_env import own_rank
from pipeline.redact import redact
from pipeline.training.ranks import stop_request

#: verb -> (module, function taking the arguments after the verb and returning an exit code, one line of help)
VERBS = {
    "train": (
        "pipeline.training.cli",
        "train",
        "train a recipe; run the same command again to resume",
    ),
    "continue": (
        "pipeline.training.cli",
        "continue_run",
        "train a finished run for longer, in a new run folder: weights, momentum and average go on",
    ),
    "launch": (
        "pipeline.launch.cli",
        "main",
        "start the ranks of this node, like torchrun: knows their exit codes, and nodes that come and go",
    ),
    "evaluate": ("pipeline.evaluation.cli", "evaluate", "score a run's checkpoint on the whole validation set"),
    "import": (
        "pipeline.evaluation.import_weights",
        "main",
        "turn external weights into a run: the original ResNet-152 script's, torchvision's",
    ),
    "export": (
        "pipeline.evaluation.export_weights",
        "main",
        "write a run's network as state_dict, safetensors or ONNX",
    ),
    "estimate": (
        "pipeline.insight.estimate.cli",
        "main",
        "work out parameters, FLOPs, memory by batch size and time, without a GPU",
    ),
    "preflight": (
        "pipeline.insight.preflight.cli",
        "main",
        "check, before a job is queued, that it would run; needs no GPU",
    ),
    "qualify": (
        "pipeline.insight.qualify.cli",
        "main",
        "check that a node is fit to train: numerics, resuming, speed, each against a bound",
    ),
    "status": ("pipeline.insight.status.cli", "main", "show how far runs are, also while they train"),
    "report": (
        "pipeline.insight.report.cli",
        "main",
        "write one page with the curves and pictures of a run, or of several",
    ),
    "audit": (
        "pipeline.insight.audit",
        "main",
        "prove which batches a run saw, by computing all digests again; compare runs",
    ),
    "resend": ("pipeline.tracking.resend", "main", "send a run's whole history to W&B, from its metrics.jsonl"),
    "chaos": (
        "pipeline.insight.chaos.cli",
        "main",
        "kill a small training job at random moments, and check that nothing is lost",
    ),
    "bench": (
        "pipeline.insight.bench.cli",
        "main",
        "measure what each part of a run costs here, beside others' loaders and loops",
    ),
    "recipes": ("pipeline.insight.recipes", "main", "list the recipes that come with the package"),
    "fetch": (
        "pipeline.dataset.acquire.fetch",
        "main",
        "download ImageNet from Kaggle, verified, with no second copy",
    ),
    "valprep": ("pipeline.dataset.valprep", "main", "sort the validation images into class folders"),
    "index": ("pipeline.dataset.index.scan", "main", "scan a tree of images once, so that training never walks it"),
    "verify": ("pipeline.dataset.verify.verify", "main", "check that a data set is complete and genuine"),
    "pack": ("pipeline.dataset.shards.pack", "main", "write WebDataset tar shards and their index"),
    "stage": ("pipeline.dataset.shards.stage", "main", "copy shards to a node's own disk, reusing what is there"),
    "synth": (
        "pipeline.dataset.synthetic.generate",
        "main",
        "generate a small ImageNet-shaped data set to try things on",
    ),
}


#: verbs that train or score, for which Linux is needed: /proc, shared memory, DALI
LINUX_ONLY = ("train", "continue", "launch", "evaluate", "qualify", "chaos", "bench")
#: verbs whose work matters more than what they print
TRAINING = ("train", "continue", "launch")
#: modules of the packages that are installed with this one, and that nothing is done without
REQUIRED = ("jsonargparse", "numpy", "PIL", "requests", "rich", "safetensors", "torch", "torchvision", "xxhash", "yaml")


def usage() -> str:
    return verb_page("pipeline", "VERB", {verb: about for verb, (_, _, about) in VERBS.items()})


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code (see `pipeline.errors`), also after a help page or a mistaken option: a
    program or notebook that calls this goes on."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:
        if not reader_has_left():
            raise
        return 128 + signal.SIGPIPE
    except SystemExit as asked:
        if asked.code is None or isinstance(asked.code, int):
            return asked.code or EXIT_OK
        print(asked.code, file=sys.stderr)
        return EXIT_RETRY


def _main(argv: list[str]) -> int:
    if len(argv) > 1 and argv[0] == "help" and argv[1] in VERBS:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), flush=True)
        return EXIT_OK
    if argv[0] in ("-V", "--version"):
        print(f"pipeline {__version__}")
        return EXIT_OK
    verb, *rest = argv
    if verb not in VERBS:
        close = close_to(verb, VERBS)
        hint = f"did you mean {close}?" if close else f"one of: {', '.join(VERBS)}"
        print(f"pipeline: unknown verb '{verb}'; {hint}", file=sys.stderr)
        return EXIT_USER
    if not _has_working_folder():
        complain(f"pipeline {verb}", "the folder that this was started in no longer exists; cd into another")
        return EXIT_USER
    if verb in LINUX_ONLY and not sys.platform.startswith("linux"):
        complain(f"pipeline {verb}", f"needs Linux, and this is {sys.platform}: run it in a Linux container")
        return EXIT_USER
    if verb != "launch":  # which may start a program of the user's
        keep_to_own_package()
    with unfailing_output() if verb in TRAINING else contextlib.nullcontext():
        return _run_verb(verb, rest)


def _run_verb(verb: str, rest: list[str]) -> int:
    module, function, _ = VERBS[verb]
    moved = give_home()
    if moved and own_rank() == 0:
        complain(f"pipeline {verb}", moved)
    try:
        with shown_on_command_line():
            code = getattr(importlib.import_module(module), function)(rest)
        sys.stdout.flush()
        return code
    except (UserError, TransientError) as error:
        complain(f"pipeline {verb}", error)
        return exit_code_of(error)
    except PermissionError as error:  # of a path that was asked for: Path.exists() and the like raise it, too
        complain(f"pipeline {verb}", permission_problem(error))
        return EXIT_USER
    except OSError as error:
        if error.errno in PASSING and error.filename is not None:
            complain(f"pipeline {verb}", f"{error.filename}: {error.strerror}; run the same command again")
            return EXIT_RETRY
        names_output = error.filename is None and not isinstance(error, BrokenPipeError)  # that one: see `main`
        problem = failure_of_stdout() if names_output else None
        if problem is None:
            raise
        complain(f"pipeline {verb}", f"stdout can't be written ({problem.strerror})")
        return EXIT_RETRY
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
            asked = ". ".join(str(error).split(". ")[1:3])
            remedy = (
                "a smaller --batch_size" if verb == "evaluate" else "another GPU; nvidia-smi shows who uses this one"
            )
            complain(f"pipeline {verb}", TransientError(f"out of GPU memory ({asked}); give {remedy}"))
            return EXIT_RETRY
        if str(error) != "Could not determine home directory.":  # Path.expanduser()'s, which does not say of whom
            raise
        complain(
            f"pipeline {verb}", "a path begins with ~NAME, and no account has that name; write ./~NAME for a folder"
        )
        return EXIT_USER
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        complain(
            f"pipeline {verb}",
            f"{sys.executable} has no module {error.name}: is it the Python that this was installed for? Activate its "
            "environment (. .venv/bin/activate); on Slurm, before sbatch, or give PYTHON",
        )
        return EXIT_USER
    except KeyboardInterrupt:
        print(f"pipeline {verb}: interrupted; run the same command to resume", file=sys.stderr)
        return EXIT_INTERRUPTED


def _has_working_folder() -> bool:
    """Does the current folder still exist?"""
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return False
    return True


def reader_has_left() -> bool:
    """Is nobody there any more to read this output, as in `pipeline recipes | head`? Then the rest goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    left = any(event & select.POLLERR for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def run() -> None:
    """Run one verb and end the process. With torch loaded, the interpreter's own shutdown is skipped: it takes a second
    that a job asked to stop may not have, and other threads may abort during it."""
    code: object = EXIT_RETRY

    def leave() -> None:
        if "torch" in sys.modules:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else EXIT_OK if code is None else EXIT_RETRY)

    def print_traceback(*error: Any) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(*error))))

    prepare_output()
    stop_request.process_is_ours = True
    sys.excepthook = print_traceback
    threading.excepthook = lambda found: print_traceback(*found[:3])
    atexit.register(leave)  # registered first, so it is called last
    code = main()
    gc.freeze()  # DALI collects garbage at exit, which takes half a second with torch's objects
    sys.exit(code)


if __name__ == "__main__":
    run()
