"""Options that say how a run is carried out may change at a resume: the losses that follow agree to rounding."""

import shutil

import pytest
import runs

from pipeline.config import RawConfig, semantic_config
from pipeline.tracking.ledger_rows import read_rows

STEPS = ["--checkpoint.every_steps", "3", "--train.precision", "fp32", "--optim.lr", "0.01"]
#: at a resume -> what it was before
TOGGLED = {
    ("--train.channels_last", "false"): ("--train.channels_last", "true"),
    ("--train.channels_last", "true"): ("--train.channels_last", "false"),
    (
        *("--train.bucket_mb", "0.1", "--train.eval_batch_size", "3", "--train.deterministic", "true"),
        *("--data.threads", "1", "--data.prefetch", "3", "--guard.compare_every_steps", "1"),
        *("--data.max_unreadable", "7", "--train.hang_timeout_s", "90", "--train.eval_every_epochs", "0.5"),
        *("--train.profile_steps", "1", "--train.compile_cache", "cache", "--guard.nonfinite", "stop"),
        *("--guard.max_skipped", "2", "--guard.max_rollbacks", "1", "--guard.rollback_lr_factor", "0.1"),
        *("--guard.rollback_reshuffle", "true", "--guard.spike_factor", "3", "--checkpoint.every_minutes", "0.001"),
        *("--checkpoint.every_epoch", "false", "--checkpoint.keep", "1", "--tracking.print_every_s", "1"),
        *("--checkpoint.outage_timeout_minutes", "1", "--tracking.name", "other", "--tracking.report", "true"),
        *("--tracking.project", "other", "--tracking.entity", "other", "--train.stop_after_evals_without_gain", "9"),
    ): (),
}
#: the others, and why they are not toggled here
ELSEWHERE = {
    **dict.fromkeys(("run_dir", "resume", "about", "train.max_steps"), "they say which run, and how far"),
    **dict.fromkeys(("data.root", "data.index"), "the same data in another place"),
    "checkpoint.every_steps": "part of every run here",
    "data.loader": "other pixels, by up to two levels: test_loaders",
    "train.micro_batch_size": "BatchNorm's statistics are over it; without BatchNorm: test_resume",
    "train.compile": "test_compile_cache: it takes long",
    "train.device": "test_gpu",
    "train.cuda_graphs": "test_gpu",
    "tracking.wandb": "test_wandb",
    "tracking.tensorboard": "test_tensorboard",
}


def test_every_option_that_may_change_is_toggled_or_has_a_reason():
    config = RawConfig().resolve()
    free = semantic_config(config, everything=True).keys() - semantic_config(config).keys()
    toggled = {word.removeprefix("--") for options in TOGGLED for word in options if word.startswith("--")}
    assert toggled | ELSEWHERE.keys() == free and not toggled & ELSEWHERE.keys()


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
