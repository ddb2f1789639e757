"""The verb `qualify`: runs the parts one after another, and writes qualify.json and a page."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.command import close_to, make_parser, split_options, summary, terminated_like_interrupted
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.files import atomic_write
from pipeline.gpu_facts import query_gpus, sign_of_gpus, visible_gpus, why_no_cuda
from pipeline.insight.qualify.page import render
from pipeline.insight.qualify.parts import PARTS, Part
from pipeline.insight.qualify.rows import Row, Settings, skipped
from pipeline.progress import duration
from pipeline.redact import redact

_LEAST_S = 60.0  # that a part may take, however short the time for all


@dataclass(frozen=True)
class Options:
    """Is this node fit to train, and does this pipeline on it what it promises? Takes --data.root DIR for a data set
    with an index. The exit code is 2 if anything failed. Runs on a CPU too, with the parts that exist there."""

    minutes: float = 10.0
    """Time for all parts together; what does not fit is skipped and said to be."""
    out: str = "runs/qualify"
    """Folder for qualify.json and index.html. Under Slurm the name of the node is added: give all nodes the same."""
    device: str = "auto"
    """auto, cuda or cpu. auto: a GPU if nvidia-smi lists one; refused where it lists none though there should be."""
    parts: str = ""
    """Only these parts, separated by commas."""


def main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        parser = make_parser("pipeline qualify", summary(Options))
        parser.add_class_arguments(Options, as_group=False)
        parser.add_argument("--data.root", type=str, help="Data set with an index; default: generated images.")
        parser.print_help()
        return EXIT_OK
    root, argv = _take_root(argv)
    options, rest = split_options(Options, "qualify", argv)
    if rest:
        close = close_to(rest[0], ("--data.root", *(f"--{item.name}" for item in fields(Options))))
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(f"{rest[0]} is not an option of pipeline qualify{hint} (see pipeline qualify --help)")
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes:g}: give a number above 0")
    gpus = len(visible_gpus(query_gpus()[0], os.environ.get("CUDA_VISIBLE_DEVICES")))
    if options.device not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {options.device}: give auto, cuda or cpu")
    sign = sign_of_gpus() if options.device == "auto" and not gpus else None
    if sign:  # a node whose GPUs are broken must not pass as one without
        raise UserError(
            f"no GPU can be used on {socket.gethostname()}, though {sign}: {why_no_cuda()}; or --device cpu"
        )
    device = options.device if options.device != "auto" else "cuda" if gpus else "cpu"
    folder = Path(options.out).expanduser()
    node = os.environ.get("SLURMD_NODENAME")
    folder = folder / node if node else folder
    begun = time.time()
    with terminated_like_interrupted():  # what a part has started must not go on
        results = run_parts(_chosen(options.parts), device, gpus, root, options.minutes)
    failed = sum(row.verdict == "FAIL" for rows in results.values() for row in rows)
    content = {
        "node": node or socket.gethostname(),
        "device": device,
        "gpus": gpus,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(begun)),
        "seconds": round(time.time() - begun, 1),
        "failed": failed,
        "parts": {name: [asdict(row) for row in rows] for name, rows in results.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "qualify.json", redact(json.dumps(content, indent=1)) + "\n")
        atomic_write(folder / "index.html", render(content))
    except OSError as error:
        raise UserError(f"--out {folder} can't be written ({error.strerror}); give another folder") from error
    print(f"{folder / 'index.html'}: {failed} failed" if failed else f"{folder / 'index.html'}: all passed", flush=True)
    return EXIT_USER if failed else EXIT_OK


def _take_root(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --data.root, and the other arguments."""
    argv = [part for item in argv for part in (item.split("=", 1) if item.startswith("--data.root=") else [item])]
    if "--data.root" not in argv:
        return "", argv
    at = argv.index("--data.root")
    if at + 1 == len(argv):
        raise UserError("--data.root: give the data set's folder")
    root = Path(argv[at + 1]).expanduser()
    if not root.is_dir():
        raise UserError(f"--data.root {root}: no such folder; give the data set's folder, or leave it out")
    return str(root.resolve()), argv[:at] + argv[at + 2 :]


def _chosen(names: str) -> list[Part]:
    if not names:
        return list(PARTS)
    known = {part.name: part for part in PARTS}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"--parts {name}: no such part; one of: {', '.join(known)}")
    return [known[name] for name in wanted]


def run_parts(parts: list[Part], device: str, gpus: int, root: str, minutes: float) -> dict[str, list[Row]]:
    """The rows of each part, in order; each is printed as soon as its part is done."""
    end = time.monotonic() + 60 * minutes
    results = {}
    for part in parts:
        left = end - time.monotonic()
        own = max(_LEAST_S, 60 * minutes * part.share)
        limit = min(own, left)
        print(f"{part.name}, at most {duration(max(0.0, limit))}", flush=True)
        if left < 1:
            results[part.name] = [skipped(part.name, "no time left; give more --minutes")]
        else:
            with tempfile.TemporaryDirectory(prefix="qualify-", ignore_cleanup_errors=True) as scratch:
                results[part.name] = run_part(part, Settings(device, gpus, root, Path(scratch), limit), limit < own)
        for row in results[part.name]:
            print(f"  {row.verdict:<7} {row.what}: {row.value}{f' ({row.bound})' if row.bound else ''}", flush=True)
    return results


def run_part(part: Part, settings: Settings, cut: bool = False) -> list[Row]:
    """The rows of a part, run in a process of its own; a crash, or a limit that is reached, is its last row.

    cut: has it less time than its share, since the parts before took more?
    """
    file, words = settings.scratch / "rows.jsonl", settings.scratch / "stderr.txt"
    given = json.dumps({**asdict(settings), "scratch": str(settings.scratch)})
    command = [sys.executable, "-m", "pipeline.insight.qualify.child", part.name, given, str(file)]
    with words.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=settings.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # and what it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [Row(**json.loads(line)) for line in lines if line.endswith("\n")]
    if code is None and cut:
        rows.append(
            Row(part.name, f"not done in the {settings.seconds:.0f} s left; give more --minutes", "", "skipped")
        )
    elif code is None:
        rows.append(Row(part.name, f"not done within {settings.seconds:.0f} s", "ends in time; see --minutes", "FAIL"))
    elif code:
        last = (words.read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        rows.append(Row(part.name, f"{how}: {last}", "does not crash", "FAIL"))
    return rows
