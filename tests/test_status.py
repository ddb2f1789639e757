"""How a run stands, read from its folder: every state that an operator meets."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import run_paths
from pipeline.__main__ import main
from pipeline.config import RawConfig, TrainConfig, to_yaml
from pipeline.insight.report import run_record
from pipeline.insight.status import run_state
from pipeline.insight.status.cli import render, render_list
from pipeline.insight.status.run_state import read_events_and_evals, read_state, read_tail
from pipeline.progress import duration
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.run_folder.lock import RunLock

NOW = time.time()
BATCH, PER_EPOCH, LAST = 32, 10, 40


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder, 40 steps long, an epoch of 10, that has just started."""
    (tmp_path / "config.yaml").write_text(
        to_yaml(RawConfig(train=TrainConfig(global_batch_size=BATCH, max_steps=LAST)).resolve())
    )
    append(tmp_path, {"kind": "event", "event": "started", "step": 0, "world_size": 4, "host": "n1"})
    return tmp_path


def append(run: Path, *rows: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def train(run: Path, first: int, last: int, images_per_s: float = 64.0) -> None:
    for step in range(first, last + 1):
        row = {"kind": "train", "step": step, "epoch": step / PER_EPOCH, "loss": 3.0 - step / 100}
        append(run, row | {"lr": 0.1, "images_per_s": images_per_s, "data_wait_fraction": 0.25, "grad_norm": 1.0})


def evaluate(run: Path, step: int, top1: float) -> None:
    row = {"kind": "eval", "step": step, "epoch": step / PER_EPOCH, "val_loss": 1.0, "val_top1": top1, "val_top5": 90.0}
    append(run, row)


def checkpoint(run: Path, step: int, age_s: float = 0.0) -> None:
    folder = run / f"checkpoints/step-{step:09d}"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    os.utime(folder / "meta.json", (NOW - age_s, NOW - age_s))


def test_training(run):
    train(run, 1, 25)
    evaluate(run, 10, 40.0)
    evaluate(run, 20, 30.0)
    checkpoint(run, 10, 500)
    checkpoint(run, 20, 100)
    state = read_state(run, NOW)
    assert (state.state, state.step, state.last_step, state.epoch) == ("training", 25, LAST, 2.5)
    assert (state.top1, state.best_top1, state.best_step) == (30.0, 40.0, 10)
    assert (state.checkpoint_step, state.world_size, state.restarts) == (20, 4, 0)
    assert state.checkpoint_age_s == pytest.approx(100, abs=1)
    assert state.images_per_s == pytest.approx(64)
    assert state.left_s == pytest.approx(15 * BATCH / 64)
    assert state.data_wait_fraction == pytest.approx(0.25)


def test_starting_until_the_first_step(run):
    assert read_state(run, NOW).state == "starting"
    train(run, 1, 1)
    assert read_state(run, NOW).state == "training"


def test_starting_again_after_a_restart(run):
    train(run, 1, 15)
    append(run, {"kind": "event", "event": "resumed", "step": 15, "world_size": 2, "slurm_job_id": "7"})
    state = read_state(run, NOW)
    assert (state.state, state.restarts, state.world_size) == ("starting", 1, 2)


def test_changes_of_the_world_size(run):
    assert "processes" not in render(read_state(run, NOW), None).split("place")[1].replace("4 processes", "")
    for step, size in ((5, 4), (10, 3), (15, 3), (1500, 4)):
        append(run, {"kind": "event", "event": "resumed", "step": step, "world_size": size, "host": "n1"})
    state = read_state(run, NOW)
    assert state.world_sizes == [(0, 4), (10, 3), (1500, 4)]
    assert "processes   4 from step 0, 3 from step 10, 4 from step 1,500" in render(state, None)
    for step in range(2000, 2008):
        append(run, {"kind": "event", "event": "resumed", "step": step, "world_size": step % 3 + 1, "host": "n1"})
    last = next(line for line in render(read_state(run, NOW), None).splitlines() if line.startswith("processes"))
    assert last.startswith("processes   ..., ") and last.endswith("1 from step 2,007") and last.count("from step") == 6


def test_the_columns_of_a_list_are_below_each_other(run):
    train(run, 1, 10)
    one = read_state(run, NOW)
    other = dataclasses.replace(one, state="interrupted by a signal", step=449_100, last_step=450_360, detail="n1")
    head, *lines = render_list([one, other], best_first=False).splitlines()
    for name in ("state", "step"):
        assert all(line[head.index(name) - 2 : head.index(name)] == "  " for line in lines)
    assert lines[0][head.index("step") :].startswith("10 of 40 ")
    assert lines[1][head.index("step") :].startswith("449,100 of 450,360  ")
    ends = head.index("images/s") + len("images/s")
    assert all(line[:ends].endswith("  64") for line in lines)


def test_a_list_fits_a_narrow_terminal_and_tells_the_runs_apart(run):
    train(run, 1, 10)
    one = dataclasses.replace(read_state(run, NOW), detail="no room is left on the disk; free some space")
    states = [dataclasses.replace(one, run=f"/home/somebody/projects/imagenet/runs/{name}") for name in ("a", "b")]
    _, *lines = render_list(states, False, 80).splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"]
    assert all(len(line) <= 80 and "no room is" in line and line.endswith("…") for line in lines)
    _, *lines = render_list(states, False, 60).splitlines()
    assert all(len(line) <= 60 and "no" not in line for line in lines)
    _, *lines = render_list(states, False, 200).splitlines()
    assert lines == render_list(states, False).splitlines()[1:] and lines[0].startswith("/home/somebody")


DAMAGED: list[dict] = [
    {"kind": ["train"], "step": 5},
    {"kind": {"train": 1}, "step": 5},
    *({"kind": "train", "step": step} for step in ([1], "7", -5, 10**400, True, 1.5, None)),
    *({"kind": "train", "step": 11, "epoch": epoch} for epoch in ("x", None, "nan", 10**400)),
    *({"kind": "train", "step": 11, "epoch": 1.1, name: [1]} for name in ("loss", "images_per_s", "lr")),
    {"kind": "train", "step": 11, "epoch": 1.1, "images_per_s": 10**400},
    {"kind": "eval", "step": 11, "epoch": 1.1},
    *({"kind": "eval", "step": 11, "epoch": 1.1, "val_top1": top1} for top1 in ("nan", None, [3.0], "x")),
    {"kind": "eval", "step": 11, "epoch": 1.1, "val_top1": 50.0, "images": "x", "left_out": "y"},
    {"kind": "eval", "step": [11], "val_top1": 50.0},
    {"kind": "event", "event": ["started"], "step": [1]},
    *({"kind": "event", "event": "started", "step": 10, "time": when} for when in ("x", 1e300)),
    {"kind": "event", "event": "started", "step": 10, "last_step": "x"},
    {"kind": "event", "event": "started", "step": 10, "world_size": [2]},
]


@pytest.mark.parametrize("row", DAMAGED, ids=lambda row: json.dumps(row)[:80])
def test_a_row_with_values_of_other_types_is_none(run, row):
    train(run, 1, 10)
    evaluate(run, 10, 40.0)
    before = read_state(run, NOW)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert dataclasses.replace(read_state(run, NOW), silent_s=before.silent_s) == before
    assert len(list(read_rows(run / "metrics.jsonl"))) == 12


def test_a_row_may_lack_fields(run, capsys):
    """The disk has changed a name in it."""
    append(run, {"kind": "train", "step": 1, "loss": 3.0}, {"kind": "eval", "step": 1, "val_top1": 40.0})
    assert "40.00 % at step 1" in render(read_state(run, NOW), None)
    assert main(["report", str(run)]) == 0


def test_a_loss_that_is_nan_is_shown(run, capsys):
    train(run, 1, 9)
    append(run, {"kind": "train", "step": 10, "epoch": 1.0, "loss": "nan", "images_per_s": 64.0, "grad_norm": "inf"})
    assert "loss        nan\n" in render(read_state(run, NOW), None)
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=lambda _: 1 / 0)["loss"] == "nan"


def test_evaluating_until_the_scores_are_there(run):
    train(run, 1, 10)
    assert read_state(run, NOW).state == "evaluating"
    evaluate(run, 10, 50.0)
    assert read_state(run, NOW).state == "training"


def test_evaluating_at_the_very_end(run):
    train(run, 1, LAST)
    assert read_state(run, NOW).state == "evaluating"


@pytest.mark.parametrize(
    "marker, content, state",
    [
        ("finished", {"step": 40}, "finished"),
        ("failed", {"exit_code": 2, "message": "the disk is full"}, "failed"),
        (
            "interrupted",
            {"step": 15, "reason": "3.0 USR1 from Slurm: a preemption"},
            "preempted",
        ),
        ("interrupted", {"step": 15, "reason": "SIGTERM"}, "preempted"),
        ("interrupted", {"step": 15, "reason": "SIGINT"}, "stopped"),
    ],
)
def test_markers(run, marker, content, state):
    train(run, 1, 15)
    (run / marker).write_text(json.dumps(content) + "\n")
    seen = read_state(run, NOW + 10_000)  # a run that ended does not stall
    assert seen.state == state
    assert content.get("message", content.get("reason", "")) in seen.detail


def test_stalled_after_a_silence_that_no_step_explains(run):
    train(run, 1, 15)
    os.utime(run / "metrics.jsonl", (NOW, NOW))
    os.utime(run / "config.yaml", (NOW, NOW))
    assert read_state(run, NOW + 100).state == "training"
    seen = read_state(run, NOW + 600)
    assert seen.state == "stalled" and "10 min" in seen.detail


def test_slow_steps_are_no_stall(run):
    train(run, 1, 15, images_per_s=0.5)  # 64 s a step
    os.utime(run / "metrics.jsonl", (NOW, NOW))
    os.utime(run / "config.yaml", (NOW, NOW))
    assert read_state(run, NOW + 600).state == "training"


def test_a_line_that_is_being_written_is_left_out(run):
    train(run, 1, 15)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 16, "epo')
    assert read_state(run, NOW).step == 15


def test_rare_rows_are_found_among_many(run):
    train(run, 1, 3000)
    evaluate(run, 3000, 50.0)
    train(run, 3001, 3010)
    ledger = run / "metrics.jsonl"
    assert [row["kind"] for row in read_events_and_evals(ledger)] == ["event", "eval"]
    assert [row["step"] for row in read_tail(ledger)][-1] == 3010


@pytest.mark.parametrize(
    ("squeue", "seen"),
    [
        ("echo '9|RUNNING|None|1:00'; echo '7|PENDING|Priority|2:00'", "PENDING (Priority)"),  # an array's last task
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "no longer known to the queue"),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "Slurm does not answer"),
        ("[[ -n ${SQUEUE_PARTITION:-} ]] || echo '7|RUNNING|None|1:00'", "RUNNING, 1:00 of its time limit left"),
        (None, "not asked about, there is no squeue here"),
    ],
)
def test_what_the_queue_says_of_a_job(run, monkeypatch, capsys, tmp_path_factory, squeue, seen):
    append(run, {"kind": "event", "event": "resumed", "step": 0, "slurm_job_id": "7"})
    programs = tmp_path_factory.mktemp("bin")
    if squeue is not None:
        (programs / "squeue").write_text(f"#!/bin/bash\n{squeue}\n")
        (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin" if squeue else str(programs))
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    assert main(["status", str(run)]) == 0
    assert f"Slurm job   7: {seen}\n" in capsys.readouterr().out


def test_json_and_table(run, capsys):
    train(run, 1, 25)
    evaluate(run, 20, 30.0)
    checkpoint(run, 20)
    assert main(["status", str(run), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["state"], seen["step"], seen["top1"], seen["slurm"]) == ("training", 25, 30.0, None)
    assert main(["status", str(run)]) == 0
    table = capsys.readouterr().out
    for text in ("training", "25 of 40 (62 %)", "30.00 %", "64 images/s", "data wait 25 %", "step 20,", "4 processes"):
        assert text in table, table


def test_watch_shows_until_the_run_ends(run, capsys, monkeypatch):
    train(run, 1, 25)
    ends = iter([lambda: train(run, 26, LAST), lambda: (run / "finished").write_text("{}")])
    monkeypatch.setattr(time, "sleep", lambda _: next(ends)())
    assert main(["status", str(run), "--watch", "--json"]) == 0
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["state"], row["step"]) for row in seen] == [("training", 25), ("evaluating", 40), ("finished", 40)]


def test_no_run_folder_is_the_users_fault(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_needs_neither_torch_nor_numpy(run):
    """An operator calls it in a loop over a hundred runs, on a login node."""
    train(run, 1, 25)
    script = (
        f"import sys; from pipeline.__main__ import main; main(['status', {str(run)!r}]); print(sorted(sys.modules))"
    )
    modules = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "'torch'" not in modules and "'numpy'" not in modules


@pytest.mark.parametrize(
    "seconds, text", [(None, "?"), (9.4, "9 s"), (72, "1 min 12 s"), (7500, "2 h 05 min"), (200_000, "2 d 7 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def sweep(run, tmp_path_factory):
    """A folder of three runs, one of them in a folder below, and what is none; best top-1 of 30, 50, none."""
    train(run, 1, 25)
    folder = tmp_path_factory.mktemp("many") / "sweep"
    for name, top1 in (("a", 30.0), ("deep/b", 50.0), ("c", None)):
        there = shutil.copytree(run, folder / name)
        if top1 is not None:
            evaluate(there, 20, top1)
    (folder / "notes").mkdir()
    (folder / "a/set-aside-after-step-000000002").mkdir()
    (folder / "a/set-aside-after-step-000000002/metrics.jsonl").write_text("")
    return folder


def test_several_runs_or_a_folder_of_them_are_a_line_each(sweep, capsys):
    (sweep / "broken/metrics.jsonl").mkdir(parents=True)  # no run
    assert main(["status", str(sweep)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "state"]
    assert [line.split()[0] for line in lines] == [str(sweep / name) for name in ("a", "c", "deep/b")]
    assert "30.00 %" in lines[0] and "training" in lines[0] and "25 of 40" in lines[0] and "50.00 %" in lines[2]
    assert main(["status", str(sweep), str(sweep / "a"), "--sort", "best"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [str(sweep / name) for name in ("deep/b", "a", "c")]
    assert main(["status", str(sweep / "c"), str(sweep / "a"), "--json"]) == 0
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["run"] for row in seen] == [str(sweep / "c"), str(sweep / "a")]


def test_a_damaged_run_hides_none_of_the_others(sweep, capsys):
    (sweep / "c/config.yaml").write_text("optim: [lr")
    assert main(["status", str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and [line.split()[1] for line in lines[1:]] == ["training", "unreadable", "training"]
    assert "config.yaml can't be read (" in lines[2]
    assert main(["status", str(sweep / "c")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_run_whose_process_is_gone_is_stalled_at_once(run):
    lock = RunLock(run)
    lock.acquire()
    train(run, 1, 3)
    assert read_state(run).state == "training"
    owner = json.loads((run / "lock").read_text())
    (run / "lock").write_text(json.dumps(owner | {"pid_start": "1"}))  # as after a kill: another process has the pid
    state = read_state(run)
    assert (state.state, state.detail) == (
        "stalled",
        f"host {owner['host']}, pid {owner['pid']} has ended without a word; the same command resumes the run",
    )
    (run / "lock").write_text(json.dumps(owner | {"machine": "another"}))
    assert read_state(run).state == "training"  # cannot be seen from here
    lock.release()


def test_imported_weights_are_no_run_that_starts(run):
    checkpoint(run, 0)
    assert read_state(run).state == "starting"
    (run / "metrics.jsonl").unlink()
    assert read_state(run).state == "imported"


def test_a_folder_without_runs_is_named(sweep, capsys):
    assert main(["status", str(sweep / "a"), str(sweep / "notes")]) == 2
    assert f"{sweep / 'notes'} is not a run folder, and none is below it" in capsys.readouterr().err


def test_folders_of_another_account_hide_no_other_run(run, tmp_path, monkeypatch, capsys):
    """One may not be entered; of one the ledger may not be read."""
    folder = tmp_path / "runs"
    files = [run / "config.yaml", run / "metrics.jsonl"]
    for name in ("closed", "mine", "ledger"):
        (folder / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder / name)

    def refusing(function, name):
        def call(path):
            if name in path.parts:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path)

        return call

    monkeypatch.setattr(run_paths, "is_run", refusing(run_paths.is_run, "closed"))
    monkeypatch.setattr(run_state, "read_tail", refusing(run_state.read_tail, "ledger"))
    assert main(["status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["unreadable", "starting"] and "ask its owner" in lines[0]

    monkeypatch.setattr(run_record, "read_rows", refusing(run_record.read_rows, "ledger"))
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("left out: ") and "ask its owner" in said[0] and (tmp_path / "page.html").is_file()
    assert main(["report", str(folder / "ledger"), "--out", str(tmp_path / "page.html")]) == 2
