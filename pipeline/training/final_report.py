"""The report at the end of a run, written by a process of its own: whatever becomes of it, the run is done."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.run_paths import RunPaths
from pipeline.training.ranks.launcher import without_launcher
from pipeline.training.ranks.stop_request import StopRequest

LIMIT_S = 1200.0


def write_report(folder: Path, device: str, stop: StopRequest, say: Callable[[str], None]) -> Path | None:
    """`pipeline report FOLDER` on "cuda" or "cpu". Says in one line where it is, or why there is none."""
    command = [sys.executable, "-m", "pipeline", "report", str(folder), "--device", device]
    say("writing the report")
    begun = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            env=without_launcher(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except OSError as error:
        say(f"no report ({error.strerror})")
        return None
    while True:
        try:
            output, _ = process.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            if stop or time.monotonic() - begun > LIMIT_S:
                process.kill()
                process.communicate()
                why = "asked to stop" if stop else f"not done after {LIMIT_S:.0f} s"
                say(f"no report ({why}); write it with: pipeline report {folder}")
                return None
    if process.returncode:
        lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
        say(f"no report ({lines[-1]}); write it with: pipeline report {folder}")
        return None
    place = RunPaths(folder).report_page
    say(f"report {place}")
    return place
