"""`pipeline chaos`: a job that is killed again and again ends as if nothing had happened; what is not so is found."""

import json
import random
import shutil

import pytest
import torch

from pipeline.__main__ import main
from pipeline.insight.chaos import compare as same_run
from pipeline.insight.chaos.faults import LATEST, PHASES, WAYS, Disturbance, Moment, draw


def test_every_way_and_phase_comes_up():
    made = draw(random.Random(1), 30, 5.0)
    assert {what.way for what in made} == set(WAYS) and {what.phase for what in made} == set(PHASES)
    assert made == draw(random.Random(1), 30, 5.0) != draw(random.Random(2), 30, 5.0)


def test_a_phase_that_was_missed_holds_up_no_fault(tmp_path):
    """A start-up that is over before the moment drawn in it."""
    steps = [7]
    moment = Moment(Disturbance("kill all", "start-up", 1000.0, 1, 0.2, 0.5), tmp_path, lambda: steps[0], lambda: False)
    steps[0] += LATEST - 1
    assert not moment.is_due()
    steps[0] += 1
    assert moment.is_due() and moment.what.phase == "training"


@pytest.mark.slow
def test_a_killed_job_ends_the_same_and_a_spoilt_one_is_told(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    code = main(["chaos", str(tmp_path / "work"), "--kills", "2", "--seed", "1", "--json", str(figures)])
    found = json.loads(figures.read_text())
    assert code == 0 and found["problems"] == [] and found["faults_survived"] == 2, found
    assert "nothing was lost" in capsys.readouterr().out

    calm, run = tmp_path / "work" / "undisturbed", tmp_path / "work" / "disturbed"
    ledger = run / "metrics.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    gone = next(i for i, line in enumerate(lines) if '"step": 5,' in line and '"train"' in line)
    ledger.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    assert any("gaps" in problem for problem in same_run.compare_ledgers(run, calm))
    ledger.write_text("".join(lines).replace('"batch_digest": "', '"batch_digest": "0', 1))
    assert same_run.check_samples(run) == ["step 1 saw another batch than planned"]
    (run / ".left.tmp").touch()
    assert same_run.check_files(run, calm) == ["stray file .left.tmp"]
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert same_run.compare_weights(run, calm)


def test_one_bit_is_a_difference():
    one = {"w": torch.zeros(3), "n": [1, 2]}
    assert same_run.differences(one, {"w": torch.zeros(3), "n": [1, 2]}) == []
    assert same_run.differences(one, {"w": torch.tensor([0.0, -0.0, 0.0]), "n": [1, 3]}) == [".w", ".n[1]"]
