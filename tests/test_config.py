"""What users write, and the one line they get for what can't be."""

import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from complaints import complaint

from pipeline.__main__ import main
from pipeline.config import (
    RawConfig,
    load_config,
    parse_config,
    recipe_names,
    recipes_folder,
    semantic_config,
    to_yaml,
)
from pipeline.config.names import ELSEWHERE, RENAMED, group_names, option_names
from pipeline.errors import UserError
from pipeline.training.run_folder.same_recipe import compare_semantic_config


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
        (["--data.image_size", "0"], ["--data.image_size is 0", "give a number above 0"]),
        (["--data.threads", "100000"], ["--data.threads is 100000", "at most 1,024", "cores"]),
        (["--train.global_batch_size", "1000000000000"], ["--train.global_batch_size is", "at most 1,048,576"]),
        (["--data.threads", "0"], ["--data.threads is 0", "above 0"]),
        (["--data.prefetch", "100000"], ["--data.prefetch is 100000", "at most 1,000", "memory"]),
        (["--data.val_size", "0"], ["--data.val_size is 0", "give a number above 0"]),
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
        (["--epochs", "5"], ["--epochs", "did you mean --schedule.epochs?"]),
        (["-b", "64"], ["option -b;", "did you mean --train.global_batch_size?"]),
        (["-j", "8"], ["option -j;", "did you mean --data.threads?"]),
        (["--workers", "8"], ["--workers", "did you mean --data.threads?"]),
        (["--arch", "resnet50"], ["--arch", "did you mean --model.name?"]),
        (["--data", "/data"], ["--data /data", "did you mean --data.root /data?"]),
        (["--optim.lrr", "0.1"], ["--optim.lrr", "did you mean --optim.lr?"]),
        (["--optm.lr=0.1"], ["--optm.lr", "did you mean --optim.lr?"]),
        (["--data.batch_size", "64"], ["--data.batch_size", "did you mean --train.global_batch_size?"]),
        (["--train.sed", "1"], ["--train.sed", "did you mean --train.seed?"]),
        (["--momentun", "0.9"], ["--momentun", "did you mean --optim.momentum?"]),
        (["--data.mean", "[.nan,0,0]"], ["--data.mean", "three numbers"]),
        (["--data.mean", "[123.7,116.3,103.5]"], ["--data.mean", "divide those of 0 to 255 by 255"]),
        (["--data.std", "[58.4,57.1,57.4]"], ["--data.std", "divide those of 0 to 255 by 255"]),
        (["--train.max_steps", "None"], ["--train.max_steps None: give a whole number or null"]),
        (["--train.max_steps", "1e2"], ["--train.max_steps 1e2: give a whole number or null"]),
        (["--train.max_steps", ""], ["--train.max_steps is empty: give a whole number or null"]),
        (["--train.precision="], ["--train.precision is empty: give one of 'bf16'"]),
        (["--data.mean", "[0.5, 0.5]"], ["--data.mean [0.5, 0.5]: give a list of 3 numbers or null"]),
        (["--data.crop_area", "[0.5]"], ["--data.crop_area [0.5]: give a list of 2 numbers"]),
        (["--checkpoint.every_epoch", "0"], ["--checkpoint.every_epoch 0: give true or false"]),
        (["--model.kwargs", "[1]"], ["--model.kwargs [1]: give a mapping, such as {name: value}"]),
        (["--augment", "randaugment"], ["--augment randaugment", "did you mean --augment.policy randaugment?"]),
        (["--train", "8"], ["--train 8", "give one of them, --train.NAME"]),
        (["--val-crop-size", "224"], ["--val_crop_size", "did you mean --data.val_size?"]),
        (["--drop-path", "0.1"], ["--drop_path", "did you mean --model.stochastic_depth?"]),
        (["--lr-step-size", "30"], ["--lr_step_size", "did you mean --schedule.step_every?"]),
        (["--pretrained"], ["--pretrained", "did you mean --model.weights?"]),
    ],
)
def test_impossible_values_are_one_clear_line(capsys, argv, words):
    line = complaint(capsys, *argv)
    assert all(word in line for word in words), line


def test_options_of_other_trainers_lead_to_options_that_there_are():
    assert set(ELSEWHERE.values()) <= set(option_names()) - set(group_names())


def test_unknown_key_in_a_recipe_file(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: {lerning_rate: 0.1}\n")
    assert "lerning_rate" in complaint(capsys, "--config", str(recipe))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: 0.1", "optim is '0.1', but it is a group of options"),
        ("train: 8", "train is '8', but it is a group of options"),
        ("data: []", "data is '[]', but"),
        ("guard: off", "guard is 'False', but"),
        ("schedule: cosine", "did you mean schedule: {name: cosine}?"),
        ("optim: {learning_rate: 0.1}", "unknown option optim.learning_rate; did you mean optim.lr?"),
        ("optim: {qqqq: 0.1}", "unknown option optim.qqqq; see pipeline train --help"),
        ("lr: 0.1", "unknown option lr; did you mean optim.lr?"),
        ("_base_: resnet152", "give both: --config resnet152 --config"),
        ("optim: {lr: 0.5}\noptim: {momentum: 0.5}", "'optim' is there twice in line 2, column 1"),
        ("optim: {lr: 0.5, lr: 0.1}", "'lr' is there twice"),
        ("train: {global_batch_size: 0100}", "0100 is the number 64 in YAML (octal, or in sixties)"),
        ("train: {seed: -010}", "-010 is the number -8 in YAML"),
        ("checkpoint:\n  every_minutes: 1:30", "1:30 is the number 90 in YAML"),
        ("checkpoint:\n  every_minutes: 1:30.5", "1:30.5 is the number 90.5 in YAML"),
    ],
)
def test_mistakes_in_a_recipe_file_are_named(capsys, tmp_path, text, words):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text + "\n")
    line = complaint(capsys, "--config", str(recipe))
    assert f"--config {recipe}" in line and words in line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("train.global_batch_size", "1:30", "1:30 is the number 90 in YAML"),
        ("optim.lr", "1:30.5", "1:30.5 is the number 90.5"),
        ("schedule.epochs", "1:30", "decimal digits"),
        ("schedule.milestones", "[10, 1:30]", "1:30 is the number 90"),
        ("data.mean", "[0.5, 0100, 0.5]", "0100 is the number 64"),
        ("model.kwargs", "{width: 1:30}", "1:30 is the number 90"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_numbers_in_another_base_are_refused_on_a_command_line(capsys, option, value, words, joined):
    """YAML 1.1 reads 1:30 as 90; recipe files refuse it, too."""
    given = [f"--{option}={value}"] if joined else [f"--{option}", value]
    line = complaint(capsys, "--config", "smoke", *given)
    assert f"--{option} {value}" in line and words in line


def test_texts_with_colons_stay_texts():
    argv = [
        "--config",
        "smoke",
        "--run_dir",
        "1:30",
        "--tracking.name",
        "0100",
        "--model.kwargs",
        "{a: 'x1:30', b: 010x}",
    ]
    config = parse_config(argv)
    assert (config.run_dir, config.tracking.name) == ("1:30", "0100")
    assert config.model.kwargs == {"a": "x1:30", "b": "010x"}
    assert parse_config(["--config", "smoke", "--train.seed", "007"]).train.seed == 7


def test_quoted_texts_in_a_mapping_stay_texts(tmp_path):
    """The parser read each of them once more: "5" became 5, and "null" nothing; also in the run's own config.yaml."""
    given = {"a": "5", "b": "null", "c": ["1", 1], "d": {"e": "true"}, "f": 5, "g": 1e3}
    config = parse_config(["--config", "smoke", "--model.kwargs", json.dumps(given)])
    assert config.model.kwargs == given
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "config.yaml")]).model.kwargs == given


def test_a_misspelled_recipe_gets_a_suggestion(capsys):
    assert "did you mean resnet152-goyal?" in complaint(capsys, "--config", "resnet152-goyl")
    assert "did you mean --config mine.yaml?" in complaint(capsys, "mine.yaml")


def test_variables_of_the_environment_in_a_recipe_files_paths(capsys, tmp_path, monkeypatch):
    """A shell would have replaced them on a command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("run_dir: $SCRATCH/run\ndata: {root: '${SCRATCH}/birds'}\n")
    config = parse_config(["--config", str(path)])
    assert (config.run_dir, config.data.root) == (f"{tmp_path}/run", f"{tmp_path}/birds")
    monkeypatch.delenv("SCRATCH")
    line = complaint(capsys, "--config", str(path))
    assert "--run_dir $SCRATCH/run: the environment has no variable SCRATCH" in line
    (tmp_path / "a$b").mkdir()
    assert parse_config(["--config", "smoke", "--data.root", "a$b"]).data.root == "a$b"


@pytest.mark.parametrize("option", ["run_dir", "model.name", "model.kwargs", "schedule.milestones", "train.precision"])
def test_a_null_in_a_recipe_file_is_named(capsys, tmp_path, option):
    """What ends in a colon is null in YAML. Some of these ended with a traceback, others counted as a value."""
    *group, name = option.split(".")
    text = f"{name}:\n" if not group else f"{group[0]}:\n  {name}:\n"
    (tmp_path / "mine.yaml").write_text(text)
    line = complaint(capsys, "--config", str(tmp_path / "mine.yaml"))
    assert f"mine.yaml: {option} is null: give a value, or leave it out" in line


def test_a_group_without_options_and_a_path_in_the_home_folder(tmp_path, monkeypatch):
    """All lines of a group may be commented out. A shell leaves `--config=~/mine.yaml` as it is."""
    (tmp_path / "mine.yaml").write_text("data:\n  # image_size: 64\noptim: {lr: 0.3}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_config(["--config=~/mine.yaml"]).optim.lr == 0.3


@pytest.mark.parametrize("argv", [["train", "--config", "smoke", "--run_dir", "~nobody-x"], ["status", "~nobody-x"]])
def test_a_path_of_an_account_that_is_not_there_is_one_line(capsys, argv):
    assert main(argv) == 2
    assert "a path begins with ~NAME, and no account has that name" in capsys.readouterr().err


def test_broken_yaml_is_one_line(capsys, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optim: [lr: 0.1\n")
    assert complaint(capsys, "--config", str(recipe))


OLD = {"augment.cutmix_share": 0.25, "augment.erase": 0.125, "augment.mix": 0.75, "augment.ops": 3,
       "checkpoint.wait_minutes": 7.0, "optim.body_lr": 0.5, "optim.clip_adaptive": 0.02,
       "schedule.made_for": 30.0, "train.profile": 4, "train.timeout_s": 99.0}  # fmt: skip


def named(config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize("old", OLD)
def test_a_renamed_option_is_accepted_with_one_warning(capsys, tmp_path, old):
    new, value = RENAMED[old], OLD[old]
    group, key = old.split(".")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({group: {key: value}}))
    assert named(load_config(tmp_path / "config.yaml"), new) == value
    assert capsys.readouterr().err == f"pipeline train: {tmp_path}/config.yaml: {old} is now called {new}\n"
    assert named(parse_config([f"--{old.replace('_', '-')}", str(value)]), new) == value
    assert capsys.readouterr().err == f"pipeline train: --{old} is now called --{new}\n"
    parse_config([f"--{new}", str(value)])
    assert capsys.readouterr().err == ""


def test_every_renamed_option_leads_to_one_that_exists():
    assert RENAMED.keys() == OLD.keys()
    assert set(RENAMED.values()) <= set(option_names()) and not set(RENAMED) & set(option_names())


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


@pytest.mark.parametrize("name", ["1e-3", "1.5e3", "0.1", "2026-11-30"])
def test_names_that_read_like_numbers_stay_names(tmp_path, name):
    """A sweep names its runs after the learning rate: `evaluate` refused the config.yaml of such a run."""
    config = parse_config(["--config", "cifar10-resnet18", "--run_dir", name, "--tracking.name", name])
    run = tmp_path / "moved"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config))
    assert load_config(run / "config.yaml") == config
    (run / "metrics.jsonl").touch()
    moved = load_config(run / "config.yaml")
    assert (moved.run_dir, moved.tracking.name, moved.optim.lr) == (str(run), name, config.optim.lr)


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
    assert unknown.returncode == 2 and unknown.stderr == "pipeline: unknown verb 'trian'; did you mean train?\n"
    assert "one of: train, " in run("nonsense").stderr
    assert run("help", "recipes").stdout == run("recipes", "--help").stdout
    listed = run("recipes")
    assert listed.returncode == 0 and all(name in listed.stdout for name in recipe_names())
    printed = run("train", "--config", "smoke", "--print_config")
    assert printed.returncode == 0 and yaml.safe_load(printed.stdout)["model"]["name"] == "resnet152"


def test_the_front_door_the_audit_and_the_dataset_room_do_not_import_torch():
    modules = ["pipeline.__main__", "pipeline.config", "pipeline.insight.audit"]
    modules += [f"pipeline.dataset.{path.stem}" for path in Path("pipeline/dataset").glob("[!_]*.py")]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("asked", ["recipes", "--help"])
def test_a_reader_that_leaves_early_is_no_error(asked):
    """As in `pipeline recipes | head -1`."""
    command = [sys.executable, "-m", "pipeline", asked]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert said == "" and process.returncode == 128 + signal.SIGPIPE


def test_a_current_folder_that_was_removed_is_one_line(tmp_path):
    """As after a job's own folder was cleaned up."""
    script = (
        f"mkdir {tmp_path}/here && cd {tmp_path}/here && rmdir {tmp_path}/here && {sys.executable} -m pipeline recipes"
    )
    here = str(Path(__file__).parents[1])
    done = subprocess.run(
        ["sh", "-c", script], env=os.environ | {"PYTHONPATH": here}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr.endswith("no longer exists; cd into another\n")


def test_a_checkpoint_with_old_names_is_of_the_same_recipe():
    settings = semantic_config(parse_config(["--augment.num_ops", "3"]))
    old = {("augment.ops" if name == "augment.num_ops" else name): value for name, value in settings.items()}
    compare_semantic_config(old, settings, "checkpoint", Path("it"))
    with pytest.raises(UserError, match=r"augment\.num_ops is 4 in the checkpoint, and 3 is"):
        compare_semantic_config(old | {"augment.ops": 4}, settings, "checkpoint", Path("it"))


def test_the_version_is_the_distributions(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pipeline {importlib.metadata.version('imagenet-pipeline')}\n"
