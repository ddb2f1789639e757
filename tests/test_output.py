"""stdout and stderr that fail: training goes on, and saves when it is asked to stop; other verbs say so in one line."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import runs
from launching import HEARD, wait_for

from pipeline.dataset.index.scan import build_index
from pipeline.output import unfailing_output
from pipeline.run_paths import list_checkpoints

OLD_NAME = ("--augment.erase", "0")  # for which there is a line on stderr
ENDLESS = ("--schedule.epochs", "100000")


@pytest.fixture(scope="module")
def root(synthetic_root):
    build_index(synthetic_root)
    return synthetic_root


def steps_of(run: Path) -> int:
    return len(runs.rows(run, "train"))


@pytest.mark.parametrize(
    ("launcher", "reason"), [([], "SIGINT"), (["launch", "--nproc-per-node=1"], "SIGTERM")], ids=["alone", "launched"]
)
def test_ctrl_c_saves_although_it_has_ended_tee(root, tmp_path, launcher, reason):
    """A shell's Ctrl-C reaches both ends of the pipe; the reader is gone first."""
    run = tmp_path / "run"
    command = runs.command(root, run, *ENDLESS)
    command = [*HEARD, *command[:3], *launcher, *command[3:]]
    process = subprocess.Popen(command, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: steps_of(run))
    process.stdout.close()
    before = steps_of(run)
    wait_for(lambda: steps_of(run) > before + 2 or process.poll() is not None)
    assert process.poll() is None  # it trains on
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    assert json.loads((run / "interrupted").read_text())["reason"] == reason and list_checkpoints(run / "checkpoints")
    assert not (run / "failed").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_below_the_log_fails_no_run(root, tmp_path, stream):
    run = tmp_path / "run"
    with Path("/dev/full").open("w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        command = runs.command(root, run, *OLD_NAME)
        done = subprocess.run(command, env=runs.environment(), **streams, text=True, timeout=120, check=False)
    assert done.returncode == 0 and (run / "finished").exists() and not (run / "failed").exists()
    if stream == "stdout":
        assert done.stderr.endswith("\nwarning: lines of stdout are lost (No space left on device)\n")


def on_a_terminal(command: list[str], columns: int = 80, **environment: str) -> str:
    """All that a command writes to a terminal of its own."""
    pid, terminal = pty.fork()
    if pid == 0:
        termios.tcsetwinsize(0, (24, columns))
        os.execvpe(command[0], command, runs.environment() | environment)
    said = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while part := os.read(terminal, 1 << 16):
            said += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return said.decode()


def test_a_dumb_terminal_shows_steps(root, tmp_path):
    """A bar says nothing there before its end."""
    options = ["--schedule.epochs", "4ba", "--tracking.print_every_s", "0.001"]
    said = on_a_terminal(runs.command(root, tmp_path / "run", *options), TERM="dumb")
    assert "step 2/4  epoch" in said and "\x1b" not in said


def test_a_narrow_terminal_shows_the_step(root, tmp_path):
    said = on_a_terminal(
        runs.command(root, tmp_path / "run", "--schedule.epochs", "4ba"), 40, TERM="xterm", NO_COLOR="1"
    )
    assert "2/4" in said


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-"])
def test_streams_that_are_closed_fail_no_run(root, tmp_path, closed):
    command = " ".join(runs.command(root, tmp_path / "run", *OLD_NAME)) + f" {closed}"
    done = subprocess.run(["sh", "-c", command], env=runs.environment(), capture_output=True, timeout=120, check=False)
    assert done.returncode == 0 and (tmp_path / "run/finished").exists(), done.stderr


def test_a_terminal_that_is_closed_ends_a_run_that_has_saved(root, tmp_path):
    run = tmp_path / "run"
    command = runs.command(root, run, *ENDLESS)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, runs.environment())
    wait_for(lambda: steps_of(run))
    os.close(terminal)  # the kernel sends SIGHUP
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert json.loads((run / "interrupted").read_text())["reason"] == "SIGHUP" and list_checkpoints(run / "checkpoints")
    assert not (run / "failed").exists()


def test_a_disk_that_has_room_again_gets_the_next_lines(tmp_path, monkeypatch):
    """/dev/full in the place of the file for a while."""
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        kept = os.dup(log.fileno())
        with unfailing_output():
            print("first", flush=True)
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, log.fileno())
            print("lost", flush=True)
            os.dup2(kept, log.fileno())
            print("last", flush=True)
    os.close(kept)
    os.close(full)
    assert (tmp_path / "log").read_text() == "first\nlast\n"


def test_streams_without_a_file_are_left_as_they_were(monkeypatch):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    with unfailing_output(), contextlib.suppress(KeyError):
        print("a line")
        raise KeyError
    assert sys.stdout is own and own.getvalue() == "a line\n"


def test_a_verb_whose_lines_are_lost_says_so(root, tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "recipes"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (
        1,
        "pipeline recipes: stdout can't be written (No space left on device)\n",
    )


def test_characters_that_the_locale_lacks_fail_no_run(root, tmp_path):
    environment = runs.environment() | {"PYTHONIOENCODING": "ascii"}
    command = runs.command(root, tmp_path / "Vögel")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "V\\xf6gel" in done.stdout, done.stderr
