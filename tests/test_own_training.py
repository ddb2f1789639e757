"""A loss and an optimizer of one's own: from training to a resumed run, and what is said where they do not fit."""

import pytest
import runs
import torch
from complaints import complaint

from pipeline.__main__ import main
from pipeline.config import load_config, parse_config
from pipeline.errors import UserError
from pipeline.training.validate import validate

SMALL = ["--train.max_steps", "4", "--train.precision", "fp32"]
LION = ["--optim.name", "training_of_others:Lion", "--optim.lr", "0.001", "--optim.kwargs", '{"betas": [0.8, 0.9]}']


@pytest.mark.parametrize(
    "options",
    [
        [*LION, "--optim.loss", "training_of_others:Focal", "--augment.mixup", "0.2"],
        ["--optim.name", "torch.optim:Adam", "--optim.lr", "0.001", "--ema.decay", "0.9"],
    ],
    ids=["own", "torch"],
)
def test_a_resumed_run_is_the_whole_one(root, tmp_path, options):
    """Bit by bit, optimizer's state included; the configuration keeps the names."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    runs.call(root, whole, *SMALL, *options)
    runs.call(root, run, *SMALL, *options, "--train.max_steps", "2")
    runs.call(root, run, *SMALL, *options)
    assert runs.repeatable(run) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(run, 4), runs.checkpoint_at(whole, 4))
    assert torch.load(runs.checkpoint_at(run, 4) / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    optim = load_config(run / "config.yaml").optim
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert (optim.name, optim.loss) == (given["--optim.name"], given.get("--optim.loss", "ce"))
    assert main(["report", str(run), "--device", "cpu"]) == 0


def test_the_loss_is_what_is_trained(root, tmp_path):
    """Cross-entropy by one's own function gives the rows of ours; another function does not."""
    found = {}
    for name in ("ce", "training_of_others:cross_entropy", "training_of_others:Focal"):
        runs.call(root, tmp_path / name, *SMALL, "--optim.loss", name)
        found[name] = [row["loss"] for row in runs.rows(tmp_path / name, "train")]
    ours, same, other = found.values()
    assert ours == same and not set(ours) & set(other)


def test_the_optimizer_is_what_trains(root, tmp_path):
    """Ours, unlike the user's, is fused: the rows are those of ours up to rounding, and Lion's are others."""
    options = {
        "ours": ["--optim.name", "adamw", "--optim.lr", "0.001"],
        "same": ["--optim.name", "torch.optim:AdamW", "--optim.lr", "0.001"],
        "other": LION,
    }
    for name, own in options.items():
        runs.call(root, tmp_path / name, *SMALL, *own)
    ours, same, other = ([row["loss"] for row in runs.rows(tmp_path / name, "train")] for name in options)
    assert same == pytest.approx(ours, rel=1e-4) and other != pytest.approx(ours, rel=1e-3)


def test_a_step_with_nan_changes_nothing(root, tmp_path):
    """Neither weights nor the optimizer's state, though the optimizer itself does not look."""
    options = [*SMALL, *LION, "--optim.loss", "training_of_others:nan_at_step_two"]
    for steps in (2, 3):
        runs.call(root, tmp_path / f"{steps}", *options, "--train.max_steps", str(steps))
    assert [row.get("skipped") for row in runs.rows(tmp_path / "3", "train")] == [None, None, True]
    before, after = runs.checkpoint_at(tmp_path / "2", 2), runs.checkpoint_at(tmp_path / "3", 3)
    for name, part in (("model.pt", None), ("optimizer.pt", "optimizer")):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (before, after))
        if part is not None:  # the rates are the schedule's
            one, other = ({"state": found[part]["state"]} for found in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_estimate_and_preflight_take_them(root, tmp_path, capsys):
    options = ["--config", runs.TINY, *LION, "--data.root", root, "--run_dir", tmp_path / "run"]
    for loss, words in (("Focal", ""), ("reads_values", "reads a tensor's values")):
        argv = ["estimate", *options, "--optim.loss", f"training_of_others:{loss}"]
        assert main([str(item) for item in argv]) == (2 if words else 0)
        assert words in capsys.readouterr().err
    main([str(item) for item in ["preflight", *options, "--optim.loss", "training_of_others:summed"]])
    assert "and returns a sum; it must return the mean over the batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("loss", "focal", "give one of 'ce', 'bce', or MODULE:FUNCTION for your own"),
        ("loss", "nowhere:loss", "nowhere can't be imported"),
        ("loss", "training_of_others:Focus", "has no function 'Focus'"),
        ("loss", "training_of_others:each", r"returns a tensor \[4\]; it must return one number"),
        ("loss", "training_of_others:number", "returns float; it must return one number"),
        ("loss", "training_of_others:constant", "has no gradient"),
        ("loss", "training_of_others:summed", "returns a sum"),
        (
            "loss",
            "training_of_others:one_argument",
            r"logits float \[4, 1000\] and labels int64 \[4\], and fails",
        ),
        ("loss", "training_of_others:Weighted", "has parameters of its own"),
        ("name", "lion", "give one of 'sgd', 'adamw', 'lamb', 'lars', or MODULE:CLASS for your own"),
        ("name", "training_of_others:no_optimizer", "gives str; it must be or return a torch.optim.Optimizer"),
        ("name", "training_of_others:no_rate", "can't be made of parameter groups and lr=0.05: .*no_rate.*kwargs has"),
        ("name", "training_of_others:regrouped", "makes parameter groups of its own"),
        ("name", "training_of_others:Idle", "changes no weight"),
        ("name", "training_of_others:Forgetful", "after a save and a load its next step is another one"),
        ("name", "torch.optim:Rprop", "has no group option 'weight_decay', so nothing would decay"),
        ("name", "training_of_others:NeedsClosure", r"step\(\) without a closure fails: .*missing"),
    ],
)
def test_what_does_not_fit_is_one_line(capsys, option, name, words):
    argv = ["--config", str(runs.TINY), f"--optim.{option}", name]
    if ":" not in name:
        assert words in complaint(capsys, *argv)
        return
    with pytest.raises(UserError, match=words) as found:
        validate(parse_config(argv), 1, "cpu", 1000)
    assert "\n" not in str(found.value) and name in str(found.value)


def test_soft_targets_are_tried_where_the_recipe_mixes():
    argv = ["--config", str(runs.TINY), "--optim.loss", "training_of_others:labels_alone"]
    validate(parse_config(argv), 1, "cpu", 1000)
    with pytest.raises(UserError, match=r"and soft targets float \[4, 1000\], and fails"):
        validate(parse_config([*argv, "--augment.mixup", "0.2"]), 1, "cpu", 1000)


def test_a_loss_may_be_made_for_the_classes_of_the_data_set(root, tmp_path):
    """A weight for each of its four classes. It is tried with as many outputs as the network will have."""
    options = ["--train.max_steps", "1", "--optim.loss", "training_of_others:weighted"]
    runs.call(root, tmp_path / "run", *options)
    line = runs.call(root, tmp_path / "other", *options, "--model.num_classes", "7", expect=2).splitlines()[-1]
    assert "training_of_others:weighted is called with logits float [4, 7]" in line and "and fails" in line
    line = runs.call(root, tmp_path / "third", "--optim.loss", "training_of_others:summed", expect=2).splitlines()[-1]
    assert "logits float [4, 4]" in line and "returns a sum" in line


@pytest.mark.parametrize(
    "options", [["--optim.kwargs", '{"a": 1}'], ["--optim.loss", "a:b", "--optim.label_smoothing", "0.1"]]
)
def test_options_of_another_choice_are_refused(capsys, options):
    assert "--optim." in complaint(capsys, *options)
