"""Starting from trained weights: whoever saved them, what is taken is said, and a head is for its classes."""

import datetime
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
import torchvision

from pipeline.__main__ import main
from pipeline.config import ModelConfig
from pipeline.dataset.index.scan import build_index
from pipeline.errors import UserError
from pipeline.model.weights import read_weights, start_from

NAME = "shufflenet_v2_x0_5"
SMALL = ["--model.name", NAME, "--model.zero_init_residual", "false", "--train.precision", "fp32"]
STILL = [*SMALL, "--optim.lr", "1e-12", "--optim.weight_decay", "0", "--train.max_steps", "1"]


OWN = torchvision.models.shufflenet_v2_x0_5(num_classes=3).state_dict()


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Evaluated after 4 steps, and saved after 2 and 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    runs.call(root, folder, *SMALL, "--train.max_steps", "4", "--checkpoint.every_steps", "2")
    return folder


@pytest.fixture(scope="module")
def breeds(root, tmp_path_factory):
    """The same images in as many classes of other names."""
    folder = tmp_path_factory.mktemp("other") / "breeds"
    for split in ("train", "val"):
        source = root / "ILSVRC/Data/CLS-LOC/train"
        for number, synset in enumerate(sorted(path.name for path in source.iterdir())):
            shutil.copytree(source / synset, folder / split / f"breed{number}")
    build_index(folder)
    return folder


def head(folder, step):
    return torch.load(runs.checkpoint_at(folder, step) / "model.pt", weights_only=True)["fc.weight"]


def under(prefix):
    return {prefix + key: value for key, value in OWN.items()}


LAYOUTS = {
    "compiled": (under("_orig_mod."), ""),
    "compiled in DDP": ({"model": under("module._orig_mod.")}, "model"),
    "DDP compiled": ({"model": under("_orig_mod.module.")}, "model"),
    "averaged": (under("module.") | {"n_averaged": torch.tensor(3)}, ""),
    "tutorial": ({"model_state_dict": OWN, "epoch": 3, "loss": 0.5}, "model_state_dict"),
    "NumPy scalars": (
        {"state_dict": OWN, "best": np.float64(71.2), "top": np.float32(1), "n": np.int64(3)},
        "state_dict",
    ),
    "net": ({"net": under("module."), "acc": 93.1}, "net"),
    "Lightning": ({"state_dict": under("model."), "hyper_parameters": {"lr": 0.1}}, "state_dict"),
    "parts in DataParallel": (
        {"state_dict": {k.replace("stage2.", "stage2.module."): v for k, v in OWN.items()}},
        "state_dict",
    ),
    "reference with an average": (
        {"model": OWN, "model_ema": under("module.") | {"n_averaged": torch.tensor(1)}},
        "model",
    ),
    "a loss and metrics beside": (
        {"state_dict": under("model.") | {"criterion.weight": torch.ones(3), "train_acc.tp": torch.zeros(3)}},
        "state_dict",
    ),
    "a backbone": ({"state_dict": under("backbone.")}, "state_dict"),
    "FSDP": ({"model": under("_fsdp_wrapped_module.")}, "model"),
    "Composer": ({"state": {"model": under("module."), "timestamp": {}}, "rng": []}, "state.model"),
    "model_state": ({"model_state": OWN, "optimizer_state": {}}, "model_state"),
    "counters of thop": (OWN | {"conv1.0.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}, ""),
    "plain data beside": (
        {
            "model": OWN,
            "root": Path("/data"),
            "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
            "losses": np.array([1.0, 2.0]),
            "name": np.str_("best"),
        },
        "model",
    ),
    "an average alone": ({"model_ema": under("module.") | {"n_averaged": torch.tensor(1)}, "epoch": 1}, "model_ema"),
    "another state beside": ({"state": {"epoch": 3}, "model_ema": under("module.")}, "model_ema"),
    "options beside": ({"params": {"lr": 0.1}, "state_dict_ema": OWN}, "state_dict_ema"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_other_scripts_are_read_and_the_entry_is_known(tmp_path, layout):
    saved, entry = LAYOUTS[layout]
    torch.save(saved, tmp_path / "file.pth")
    state, found, classes = read_weights(tmp_path / "file.pth")
    assert found == entry and classes is None
    assert state.keys() == OWN.keys() and all(torch.equal(state[key], OWN[key]) for key in OWN)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_a_body_alone_leave_the_head_fresh(tmp_path, prefix):
    body = {prefix + key: value for key, value in OWN.items() if not key.startswith("fc.")}
    torch.save(body, tmp_path / "body.pth")
    network, lines = torchvision.models.shufflenet_v2_x0_5(num_classes=3), []
    fresh = network.fc.weight.clone()
    config = ModelConfig(name=NAME, weights=str(tmp_path / "body.pth"))
    start_from(network, config, say=lines.append)
    assert "the head fc starts fresh: the weights have none" in lines[0] and torch.equal(network.fc.weight, fresh)
    assert torch.equal(network.conv5[0].weight, OWN["conv5.0.weight"])
    with pytest.raises(UserError, match=r"fc\.weight is missing"):
        start_from(network, replace(config, keep_head=True))
    del body[prefix + "conv1.0.weight"]
    torch.save(body, tmp_path / "body.pth")
    with pytest.raises(UserError, match=r"does not fit .* conv1\.0\.weight is missing$"):
        start_from(network, config)


@pytest.mark.parametrize("what", ["diverged", "TorchScript", "no weights", "text", "onnx"])
def test_a_file_without_usable_weights_is_one_line_that_says_what_it_holds(tmp_path, capsys, what):
    file = tmp_path / ("file.onnx" if what == "onnx" else "file.pth")
    if what == "diverged":
        torch.save({"model": OWN | {"fc.bias": torch.tensor([0.0, float("nan"), 0.0])}}, file)
    elif what == "TorchScript":
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(file))
    elif what in ("text", "onnx"):
        file.write_text("about: weights")
    else:
        torch.save({"optimizer": {}, "epoch": 3}, file)
    assert main(["import", str(file), str(tmp_path / "run"), "--name", NAME]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    words = {
        "text": "torch.save did not write it",
        "onnx": "is an ONNX file, which is not read",
        "diverged": "fc.bias hold NaN",
        "TorchScript": "torch.jit.load",
        "no weights": "optimizer, epoch",
    }
    assert words[what] in line


def test_too_little_memory_is_no_fault_of_the_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    torch.save(OWN, tmp_path / "file.pth")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        read_weights(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "is empty: give"),
        ("https://host/a.pth", "download it first"),
        ("RUN/checkpoints", "newest: RUN/checkpoints/step-0"),
    ],
)
def test_what_names_no_weights_is_one_line(run, given, words):
    config = ModelConfig(name=NAME, weights=given.replace("RUN", str(run)))
    with pytest.raises(UserError, match=words.replace("RUN", str(run))):
        start_from(torchvision.models.shufflenet_v2_x0_5(num_classes=3), config)


def test_code_beside_the_weights_is_still_refused(tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"state_dict": OWN, "more": Payload()}, tmp_path / "file.pth")
    assert main(["import", str(tmp_path / "file.pth"), str(tmp_path / "run"), "--name", NAME]) == 2
    told = capsys.readouterr()
    assert "read safely" in told.err and "run\n" not in told.out


def test_a_run_stands_for_its_best_checkpoint_and_its_own_classes_keep_the_head(root, run, tmp_path):
    printed = runs.call(root, tmp_path / "tuned", *STILL, "--model.weights", str(run))
    assert f"weights from {run} (step-000000004)" in printed and "the head is kept" in printed
    assert torch.allclose(head(run, 4), head(tmp_path / "tuned", 1), atol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
def test_a_head_of_as_many_other_classes_starts_fresh_unless_asked(run, breeds, tmp_path, keep):
    weights = runs.checkpoint_at(run, 4)
    options = ["--model.keep_head", "true"] if keep else []
    printed = runs.call(breeds, tmp_path / "tuned", *STILL, "--model.weights", str(weights), *options)
    assert str(weights) in printed and ("breed0" in printed) != keep
    assert torch.allclose(head(run, 4), head(tmp_path / "tuned", 1), atol=1e-6) == keep


def test_an_export_has_the_names_of_the_run_whatever_data_is_here(root, run, breeds, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "no.pth"), "--data_root", str(breeds)]) == 2
    assert "breed0" in capsys.readouterr().err and not (tmp_path / "no.pth").exists()
    gone = shutil.copytree(run, tmp_path / "gone")
    config = (gone / "config.yaml").read_text().replace(str(root), str(tmp_path / "nowhere"))
    (gone / "config.yaml").write_text(config)
    assert main(["export", str(gone), str(tmp_path / "yes.pth")]) == 0
    classes = [entry["synset"] for entry in json.loads((tmp_path / "yes.pth.json").read_text())["classes"]]
    meta = json.loads((runs.checkpoint_at(run, 4) / "meta.json").read_text())
    assert classes == meta["classes"] and len(classes) == 4
    capsys.readouterr()
    assert main(["evaluate", str(gone)]) == 2
    assert "--data_root" in capsys.readouterr().err
    assert main(["evaluate", str(gone), "--data_root", str(root)]) == 0


def test_a_longer_schedule_names_the_way_and_no_option_that_was_not_typed(root, run):
    printed = runs.call(root, run, *SMALL, "--schedule.epochs", "9", expect=2)
    assert "schedule.epochs is 4.0 in the run folder, and 9.0 is asked for" in printed and "--model.weights" in printed
    assert "reference_epochs" not in printed and "may change" in printed


def test_a_relative_data_root_is_found_from_any_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(root.parent)
    runs.call(root.name, tmp_path / "run", *SMALL, "--train.max_steps", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "run", "--checkpoint", "last"]) == 0
