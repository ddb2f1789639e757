"""Weeks with a run in one go: stopped, changed, resumed, extended, fine-tuned, scored, exported, moved, compared."""

import json
import shutil
import signal

import pytest
import runs
import torch
import torchvision

from pipeline.__main__ import main
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings, generate_tree

#: 4 steps an epoch
DAILY = [
    *("--train.global_batch_size", "24", "--train.eval_every_epochs", "1", "--checkpoint.every_epoch", "true"),
    *("--train.precision", "fp32", "--schedule.epochs", "5", "--ema.decay", "0.9", "--optim.lr", "0.02"),
]


@pytest.fixture
def breeds(tmp_path):
    """Class folders of four other classes."""
    made = tmp_path / "made"
    generate_tree(made, Settings(classes=4, train_per_class=24, val_per_class=6, size=64, seed=9))
    pets = tmp_path / "pets"
    for split in ("train", "val"):
        for folder in sorted((made / "ILSVRC/Data/CLS-LOC/train").iterdir()):
            images = sorted(folder.iterdir())
            there = pets / split / f"breed-{folder.name}"
            there.mkdir(parents=True)
            for image in images[:18] if split == "train" else images[18:]:
                shutil.copy(image, there)
    return pets


def steps(run):
    return [row["step"] for row in runs.rows(run, "train")]


@pytest.mark.slow
def test_a_run_that_people_live_with(root, breeds, tmp_path, monkeypatch, capsys):
    home, archive = tmp_path / "runs", tmp_path / "archive"
    run = home / "first"
    data = shutil.copytree(root, tmp_path / "data")

    def pipeline(*argv, expect=0):
        capsys.readouterr()
        code = main(list(map(str, argv)))
        said = capsys.readouterr()
        assert code == expect and "Traceback" not in said.out + said.err, said.out + said.err
        return said.out + said.err

    # start, Ctrl-C, an allowed option, resume; as if nothing had been
    code, output = runs.stop_when(lambda: len(steps(run)) >= 3, signal.SIGINT, data, run, *DAILY)
    assert code == 75 and "saving at the end of this step" in output
    stopped = steps(run)[-1]
    assert stopped < 20 and json.loads((run / "interrupted").read_text())["step"] == stopped
    runs.call(data, run, *DAILY, "--optim.lr", "0.1", expect=2)
    runs.call(data, run, *DAILY, "--checkpoint.keep", "3", "--train.eval_batch_size", "5")
    assert steps(run) == list(range(1, 21))
    whole = tmp_path / "whole"
    runs.call(data, whole, *DAILY)
    assert runs.repeatable(run) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(run, 20), runs.checkpoint_at(whole, 20))

    # extend
    longer = home / "longer"
    said = pipeline("continue", run, "--epochs", "6", "--run_dir", longer)
    assert "continuing" in said and steps(longer) == [21, 22, 23, 24]

    # fine-tune on other classes
    tuned = home / "tuned"
    said = runs.call(breeds, tuned, *DAILY, "--schedule.epochs", "1", "--model.weights", str(run))
    assert "the head fc starts fresh" in said and "breed-" in said
    assert [row["event"] for row in runs.rows(tuned, "event")] == ["started", "finished"]

    # evaluate elsewhere
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    shutil.rmtree(elsewhere / "index")
    build_index(elsewhere)
    pipeline("evaluate", longer, "--checkpoint", "last", "--data_root", elsewhere, "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["val_loss"] == pytest.approx(runs.rows(longer, "eval")[-1]["val_loss"], rel=1e-4)
    said = pipeline("evaluate", tuned, "--data_root", elsewhere, expect=2)
    assert "class" in said

    # export, and three lines of plain torchvision
    pipeline("export", longer, tmp_path / "net.pth", "--weights", "raw", "--checkpoint", "last")
    model = torchvision.models.resnet18(num_classes=4)
    model.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    kept = torch.load(runs.checkpoint_at(longer, 24) / "model.pt", weights_only=True)
    assert torch.equal(model.state_dict()["fc.weight"], kept["fc.weight"])

    # move both folders
    archive.mkdir()
    for folder in (run, longer):
        folder.rename(archive / folder.name)
    data.rename(tmp_path / "data-2")
    said = pipeline("train", "--config", archive / "longer/config.yaml", "--data.root", tmp_path / "data-2")
    assert "already finished" in said and not longer.exists()
    said = pipeline("evaluate", archive / "first", expect=2)
    assert "--data_root" in said

    # sweep three rates, compare
    for lr in ("0.1", "0.02", "0.001"):
        runs.call(tmp_path / "data-2", home / f"sweep/lr-{lr}", *DAILY, "--optim.lr", lr, "--schedule.epochs", "1")
    lines = pipeline("status", home / "sweep", "--sort", "best").splitlines()[1:]
    best = [max(row["val_top1"] for row in runs.rows(runs.Path(line.split()[0]), "eval")) for line in lines]
    assert len(lines) == 3 and all("finished" in line for line in lines)
    shown = [float(line.split("%")[0].split()[-1]) for line in lines]
    assert shown == sorted(shown, reverse=True) and all(a >= b - 0.01 for a, b in zip(shown, best, strict=True))
    pipeline("report", home / "sweep", archive, "--out", tmp_path / "all.html", "--data_root", tmp_path / "data-2")
    page = (tmp_path / "all.html").read_text()
    assert all(name in page for name in ("lr-0.1", "lr-0.02", "lr-0.001", "first", "longer"))
    assert "<td>optim.lr</td><td>0.001</td><td>0.02</td><td>0.1</td>" in page
