"""`pipeline chaos`: a job that is killed again and again ends as if nothing had happened; what is not so is found."""

import json
import random
import shutil
from typing import ClassVar

import pytest
import torch

from pipeline.__main__ import main
from pipeline.errors import TransientError
from pipeline.insight.chaos import compare, tries
from pipeline.insight.chaos.faults import KINDS, MAX_STEPS_APART, PHASES, Fault, Trigger, draw_faults


def test_every_kind_and_phase_is_drawn():
    made = draw_faults(random.Random(1), 30, 5.0)
    assert {fault.kind for fault in made} == set(KINDS) and {fault.phase for fault in made} == set(PHASES)
    assert made == draw_faults(random.Random(1), 30, 5.0) != draw_faults(random.Random(2), 30, 5.0)


def test_a_phase_that_was_missed_holds_up_no_fault(tmp_path):
    """A start-up that is over before the moment drawn in it."""
    steps = [7]
    trigger = Trigger(Fault("kill all", "start-up", 1000.0, 1, 0.2, 0.5), tmp_path, lambda: steps[0], lambda: False)
    steps[0] += MAX_STEPS_APART - 1
    assert not trigger.is_due()
    steps[0] += 1
    assert trigger.is_due() and trigger.fault.phase == "training"


class Scripted:
    """In the place of `Tries`: each start, loss and end takes the next outcome; False: it went wrong."""

    outcomes: ClassVar[list[bool]] = []

    def __init__(self, job, seed):
        job.log.touch()

    def begin(self, *_):
        if not self.outcomes.pop(0):
            raise TransientError("wrong")
        return 1.5

    lose = end = begin


STARTS = [f"start of job {number}" for number in range(1, 6)]


@pytest.mark.parametrize(
    ("outcomes", "tried", "good", "problems"),
    [
        ([True, True, True, True, True], 3, 3, []),
        ([True, True, False, True, True, True], 3, 2, ["try 2, node frozen: wrong"]),
        ([True, True, True, True, False], 3, 3, ["end of job 1: wrong"]),
        ([False, True, True, True, True, True], 3, 3, ["start of job 1: wrong"]),
        (
            [False, False, True, False, False, False, True, True, True, True],  # two, and two
            *(3, 2),
            [f"{what}: wrong" for what in (*STARTS[:2], "try 1, launcher killed", *STARTS[3:])],
        ),
        ([False] * 3, 0, 0, [f"start of job {n}: wrong" for n in (1, 2, 3)]),  # not for ever
    ],
)
def test_tries_are_counted(tmp_path, monkeypatch, outcomes, tried, good, problems):
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(tries, "Tries", Scripted)
    monkeypatch.setattr(Scripted, "outcomes", outcomes)
    found = tries.lose_nodes(tmp_path / "work", 3, 0)
    assert (found["tries"], tries.count_good(found), found["problems"]) == (tried, good, problems)
    assert not outcomes


@pytest.mark.long
def test_a_killed_job_ends_the_same_and_a_damaged_one_is_reported(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    code = main(["chaos", str(tmp_path / "work"), "--kills", "2", "--seed", "1", "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert code == 0 and found["problems"] == [] and found["faults_survived"] == 2, found
    assert "nothing was lost" in capsys.readouterr().out

    reference, run = tmp_path / "work" / "reference", tmp_path / "work" / "faulted"
    ledger = run / "metrics.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    gone = next(i for i, line in enumerate(lines) if '"step": 5,' in line and '"train"' in line)
    ledger.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    assert any("gaps" in problem for problem in compare.compare_ledgers(run, reference))
    ledger.write_text("".join(lines).replace('"batch_digest": "', '"batch_digest": "0', 1))
    assert compare.check_samples(run) == ["step 1 has another batch than the plan"]
    (run / ".left.tmp").touch()
    assert compare.check_files(run, reference) == ["unexpected file .left.tmp"]
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert compare.compare_weights(run, reference)


def test_one_bit_is_a_difference():
    one = {"w": torch.zeros(3), "n": [1, 2]}
    assert compare.differences(one, {"w": torch.zeros(3), "n": [1, 2]}) == []
    assert compare.differences(one, {"w": torch.tensor([0.0, -0.0, 0.0]), "n": [1, 3]}) == [".w", ".n[1]"]
