"""Options that say how a run is carried out may change at a resume: the losses that follow agree to rounding."""

import shutil

import pytest
import runs

from pipeline.tracking.ledger import read_rows

STEPS = ["--checkpoint.every_steps", "3", "--train.precision", "fp32", "--optim.lr", "0.01"]
#: at a resume -> what it was before
TOGGLED = {
    ("--train.channels_last", "false"): ("--train.channels_last", "true"),
    ("--train.channels_last", "true"): ("--train.channels_last", "false"),
    (
        *("--train.bucket_mb", "0.1", "--train.eval_batch_size", "3", "--train.deterministic", "true"),
        *("--data.threads", "1", "--data.prefetch", "3", "--guard.compare_every_steps", "1"),
    ): (),
}


@pytest.fixture(scope="module")
def begun(root, tmp_path_factory):
    """Run folders of 3 steps, and the losses of 6, by their options."""
    made: dict[tuple, tuple] = {}

    def run(options):
        if options not in made:
            half, whole = (tmp_path_factory.mktemp("free") / name for name in ("half", "whole"))
            runs.call(root, half, *options, *STEPS, "--train.max_steps", "3")
            shutil.copytree(half, whole)
            runs.call(root, whole, *options, *STEPS, "--train.max_steps", "6")
            made[options] = half, losses(whole)
        return made[options]

    return run


def losses(run):
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]


@pytest.mark.parametrize("now", TOGGLED, ids=lambda options: " ".join(options))
def test_a_resume_with_another_way(root, begun, tmp_path, now):
    half, expected = begun(TOGGLED[now])
    shutil.copytree(half, tmp_path / "run")
    runs.call(root, tmp_path / "run", *now, *STEPS, "--train.max_steps", "6")
    found = losses(tmp_path / "run")
    assert len(found) == 6 and found[3:] == pytest.approx(expected[3:], rel=1e-3)
