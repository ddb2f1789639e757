"""What users write, and the one line they get for what can't be."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from complaints import complaint

from pipeline.config import (
    RawConfig,
    load_config,
    parse_config,
    recipe_names,
    recipes_folder,
    semantic_config,
    to_yaml,
)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optim.lr", "-1"], ["--optim.lr", "-1", "above 0"]),
        (["--optim.lr", "abc"], ["optim.lr", "abc"]),
        (["--optm.lr", "0.1"], ["--optm.lr"]),
        (["--train.precision", "fp8"], ["train.precision", "fp8", "bf16"]),
        (["--config", "resnet1152"], ["resnet1152", "resnet152"]),
        (["--train.global_batch_size", "0"], ["--train.global_batch_size", "0"]),
        (["--schedule.milestones", "[60, 30]"], ["--schedule.milestones", "rising"]),
        (["--data.crop_area", "[0.5, 0.1]"], ["--data.crop_area", "smallest"]),
        (["--data.val_resize", "100"], ["--data.val_resize", "100"]),
        (["--data.start_size", "64"], ["--data.start_size", "64", "data.ramp_epochs"]),
        (["--data.start_size", "400", "--data.ramp_epochs", "[0,2]"], ["--data.start_size", "400", "image_size 224"]),
        (["--data.start_size", "64", "--data.ramp_epochs", "[5,2]"], ["--data.ramp_epochs", "first <= last"]),
        (["--data.val_crop_ratio", "1.5"], ["--data.val_crop_ratio", "1.5", "at most 1"]),
        (["--data.val_crop_ratio", "0.9", "--data.val_resize", "256"], ["--data.val_crop_ratio", "data.val_resize"]),
        (["--data.interpolation", "lanczos"], ["data.interpolation", "lanczos", "bicubic"]),
        (["--schedule.warmup_epochs", "90"], ["--schedule.warmup_epochs", "below schedule.epochs"]),
        (["--optim.nesterov", "--optim.momentum", "0"], ["--optim.nesterov"]),
        (["--optim.name", "adam"], ["optim.name", "give one of 'sgd', 'adamw'", "adam"]),
        (["--model", "resnet50"], ["--model resnet50", "did you mean --model.name resnet50?"]),
        (["--lr", "0.1"], ["--lr", "did you mean --optim.lr?"]),
        (["--data-root=/data"], ["--data_root", "did you mean --data.root?"]),
        (["--batch-size", "64"], ["--batch_size", "did you mean --train.global_batch_size?"]),
        (["--data.mean", "[.nan,0,0]"], ["--data.mean", "three numbers"]),
    ],
)
def test_impossible_values_are_one_clear_line(capsys, argv, words):
    line = complaint(capsys, *argv)
    assert all(word in line for word in words), line


def test_unknown_key_in_a_recipe_file(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: {lerning_rate: 0.1}\n")
    assert "lerning_rate" in complaint(capsys, "--config", str(recipe))


def test_broken_yaml_is_one_line(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: [lr: 0.1\n")
    assert complaint(capsys, "--config", str(recipe))


def test_overrides_come_after_the_recipe():
    config = parse_config(["--config", "resnet152-goyal", "--optim.lr", "0.4", "--run-dir", "there", "--train.compile"])
    assert (config.model.name, config.optim.lr, config.run_dir, config.train.compile) == (
        "resnet152",
        0.4,
        "there",
        True,
    )
    assert config.schedule.milestones == (30.0, 60.0, 80.0)


def test_saved_configuration_reads_back(tmp_path):
    config = parse_config(["--config", "cifar10-resnet18", "--data.crop_area", "[0.2, 0.9]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_identity_holds_what_changes_the_result_and_nothing_else():
    names = semantic_config(RawConfig().resolve())
    assert {"optim.lr", "data.image_size", "train.seed", "train.global_batch_size", "schedule.epochs"} <= names.keys()
    free = {"data.root", "run_dir", "data.threads", "train.device", "checkpoint.keep", "tracking.wandb", "resume"}
    assert not free & names.keys()
    moved = dataclasses.replace(RawConfig().resolve(), run_dir="elsewhere")
    assert semantic_config(moved) == names


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_say_what_they_are(name):
    config = parse_config(["--config", name])
    assert config.about["what"] and config.about["source"]
    written = yaml.safe_load((recipes_folder() / f"{name}.yaml").read_text())
    assert all(getattr(config.optim, key) == value for key, value in written["optim"].items())


def run(*argv):
    return subprocess.run([sys.executable, "-m", "pipeline", *argv], capture_output=True, text=True, check=False)


def test_front_door():
    shown = run("--help")
    assert shown.returncode == 0 and "train" in shown.stdout
    unknown = run("trian")
    assert unknown.returncode == 2 and "trian" in unknown.stderr and unknown.stderr.count("\n") == 1
    listed = run("recipes")
    assert listed.returncode == 0 and all(name in listed.stdout for name in recipe_names())
    printed = run("train", "--config", "smoke", "--print_config")
    assert printed.returncode == 0 and yaml.safe_load(printed.stdout)["model"]["name"] == "resnet152"


def test_the_front_door_and_the_dataset_room_do_not_import_torch():
    modules = ["pipeline.__main__", "pipeline.config"]
    modules += [f"pipeline.dataset.{path.stem}" for path in Path("pipeline/dataset").glob("[!_]*.py")]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_reader_that_leaves_early_is_no_error():
    """As in `pipeline recipes | head -1`."""
    command = [sys.executable, "-m", "pipeline", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert said == "" and process.returncode == 128 + signal.SIGPIPE
