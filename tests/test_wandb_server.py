"""W&B's server fails in all ways: training keeps its speed, nothing raises, and the history can be had afterwards."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import wandb
from test_wandb import history
from wandb_server import KEY, WandbServer

from pipeline.__main__ import main
from pipeline.config import RawConfig, TrackingConfig, to_yaml
from pipeline.insight.chaos.faults import descendants
from pipeline.tracking import wandb_view
from pipeline.tracking.wandb_view import WandbView

STEPS = 200


@pytest.fixture
def server(monkeypatch):
    running = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", running.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_view, "_INIT_TIMEOUT_S", 3)
    monkeypatch.setattr(wandb_view, "_FINISH_TIMEOUT_S", 3)
    wandb.teardown()  # its process keeps the address of the server before
    yield running
    running.stop()


def train(run_dir, said, first=1, disturb=lambda view: None) -> float:
    """Log steps as a run does; `disturb` comes in the middle. Returns the longest time that a row took, in seconds."""
    longest = 0.0
    view = WandbView(TrackingConfig(wandb="online"), run_dir, {"optim.lr": 0.1}, {}, said.append)
    for step in range(first, first + STEPS):
        if step == first + STEPS // 2:
            disturb(view)
        begun = time.thread_time()  # this thread's own: the machine may be busy
        view.log({"kind": "train", "step": step, "loss": 1 / step})
        longest = max(longest, time.thread_time() - begun)
    view.close()
    return longest


def kept(run_dir) -> list[int]:
    """The steps in W&B's files of this run, online or not: what `wandb sync` sends."""
    for file in (run_dir / "wandb").glob("run-*"):
        file.rename(file.with_name(f"offline-{file.name}-online"))
    return [row["_step"] for row in history(run_dir)]


def test_a_server_that_works_gets_each_step_once_and_nothing_else(server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[001-128]")
    monkeypatch.setattr(sys, "argv", ["pipeline", "train", "--secret-option"])
    said = []
    train(tmp_path, said)
    assert server.steps() == list(range(1, STEPS + 1)) and not said
    everything = "\n".join(server.asked)
    for secret in (KEY, "wJalrXUtnFEMI", "node[001", "--secret-option", f'"{socket.gethostname()}"'):
        assert secret not in everything


@pytest.mark.parametrize("mode", [403, 500, "hang", "close"])
def test_a_server_that_fails_at_the_start(server, tmp_path, mode):
    server.mode, said = mode, []
    assert train(tmp_path, said) < 0.5
    assert len(said) == 1 and "continuing offline" in said[0]
    assert kept(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("mode", [403, 500, "hang", "close"])
def test_a_server_that_fails_in_the_middle(server, tmp_path, mode):
    said = []

    def disturb(_):
        server.mode = mode

    assert train(tmp_path, said, disturb=disturb) < 0.5
    assert kept(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_the_whole_history_can_be_sent_afterwards(server, tmp_path, capsys, mode):
    """From a ledger that was torn in its last line, whatever W&B had got of it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(RawConfig(run_dir=str(run)).resolve()))
    rows = [{"kind": "train", "step": step, "loss": 1 / step} for step in range(1, 31)]
    rows += [{"kind": "event", "event": "resumed", "step": 3}, {"kind": "eval", "step": 20, "val_top1": 50.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tra')
    assert main(["resend", str(run), "--mode", mode]) == 0
    assert "31 rows" in capsys.readouterr().out
    sent = [server.rows[line] for line in sorted(server.rows)] if mode == "online" else history(run)
    assert [row["_step"] for row in sent] == list(range(1, 31)) and sent[19]["val_top1"] == 50.0


def test_its_own_process_killed_is_said_once(server, tmp_path):
    said = []

    def kill(_):
        for pid in descendants(os.getpid()):
            if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    train(tmp_path, said, disturb=kill)
    assert len(said) == 1 and "metrics.jsonl has everything" in said[0]
