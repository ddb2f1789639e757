"""Weights from the slides' code come in and go out again: same outputs, plain formats, nothing unpickled."""

import argparse
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from pipeline.__main__ import main
from pipeline.config import ModelConfig, load_config, parse_config
from pipeline.dataset.index.scan import build_index
from pipeline.errors import UserError
from pipeline.evaluation.class_map import order_warning
from pipeline.evaluation.export_weights import expected_means
from pipeline.evaluation.import_weights import classes_for
from pipeline.model.build import build_model
from pipeline.model.legacy_checkpoint import convert_to_torchvision, guess_model_name
from pipeline.model.weights import start_from


class SlidesBlock(nn.Module):
    """A bottleneck block as the slides describe it: convolutions with bias, the shortcut called identity_downsample."""

    def __init__(self, inputs: int, width: int, identity_downsample: nn.Module | None = None, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, padding=1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu, self.identity_downsample = nn.ReLU(), identity_downsample

    def forward(self, x):
        identity = x if self.identity_downsample is None else self.identity_downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + identity)


class SlidesResNet(nn.Module):
    def __init__(self, blocks: list[int], classes: int):
        super().__init__()
        self.inputs = 64
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 64, 7, 2, padding=3), nn.BatchNorm2d(64), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for number, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
            setattr(self, f"layer{number}", self.stage(count, width, 1 if number == 1 else 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(2048, classes)

    def stage(self, count: int, width: int, stride: int) -> nn.Sequential:
        shortcut = nn.Sequential(nn.Conv2d(self.inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))
        first = SlidesBlock(self.inputs, width, shortcut, stride)
        self.inputs = 4 * width
        return nn.Sequential(first, *(SlidesBlock(4 * width, width) for _ in range(count - 1)))

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def lived_in(model: nn.Module) -> nn.Module:
    """Biases, statistics, gammas and betas that are not what they start as."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.uniform_(module.bias, -0.3, 0.3)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_slides_model_is_theirs():
    with torch.device("meta"):
        model = SlidesResNet([3, 8, 36, 3], 1000)
    assert sum(p.numel() for p in model.parameters()) == 60_268_520
    assert guess_model_name(model.state_dict()) == "resnet152"


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """The slides' ResNet-50 for 4 classes, and its resnet.pth."""
    model = lived_in(SlidesResNet([3, 4, 6, 3], 4))
    path = tmp_path_factory.mktemp("slides") / "resnet.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.fixture(scope="module")
def imported(slides, synthetic_root, tmp_path_factory):
    """It as a run folder on the synthetic data."""
    build_index(synthetic_root)
    run = tmp_path_factory.mktemp("imported") / "run"
    assert main(["import", str(slides[1]), str(run), "--data_root", str(synthetic_root)]) == 0
    return run


@pytest.mark.parametrize(
    ("blocks", "name"), [([3, 4, 6, 3], "resnet50"), ([3, 4, 23, 3], "resnet101"), ([3, 8, 36, 3], "resnet152")]
)
def test_folded_biases_give_the_same_outputs(blocks, name):
    theirs = lived_in(SlidesResNet(blocks, 10))
    ours = torchvision.models.get_model(name, num_classes=10).eval()
    ours.load_state_dict(convert_to_torchvision(theirs.state_dict()), strict=True)
    with torch.no_grad():
        expected, found = theirs(IMAGES), ours(IMAGES)
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


def exported(run, path, *options) -> dict:
    assert main(["export", str(run), str(path), "--checkpoint", "last", *options]) == 0
    return json.loads(path.with_name(path.name + ".json").read_text())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_import_and_export_into_torchvision(slides, imported, tmp_path, suffix):
    card = exported(imported, tmp_path / f"model{suffix}")
    if suffix == ".pth":
        state = torch.load(tmp_path / "model.pth", weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(tmp_path / "model.safetensors")
    model = torchvision.models.resnet50(num_classes=4).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), slides[0](IMAGES), rtol=1e-5, atol=1e-5)
    assert [entry["synset"] for entry in card["classes"]] == sorted(entry["synset"] for entry in card["classes"])
    assert len(card["classes"]) == card["num_classes"] == 4
    assert card["preprocessing"]["resize_shorter_side"] == 256 and card["preprocessing"]["center_crop"] == 224


def test_onnx_gives_the_same_logits_for_any_batch(slides, imported, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    exported(imported, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.rand(batch, 3, 224, 224)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, slides[0](images).numpy(), rtol=1e-3, atol=1e-4)


def test_an_imported_run_can_be_scored_and_trained_on(imported, synthetic_root, tmp_path, capsys):
    assert main(["evaluate", str(imported), "--checkpoint", "last"]) == 0
    assert "images        24" in capsys.readouterr().out
    weights = ["--model.name", "resnet50", "--model.weights", str(imported / "checkpoints" / "step-000000000")]
    runs.call(synthetic_root, tmp_path / "run", *weights, "--train.max_steps", "1", "--optim.lr", "1e-12")
    before, after = (
        torch.load(path / "model.pt", weights_only=True)["layer3.5.conv2.weight"]
        for path in (imported / "checkpoints" / "step-000000000", runs.checkpoint_at(tmp_path / "run", 1))
    )
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("layer4.2.bn3.weight"), "layer4.2.bn3.weight"),
        (lambda state: state.pop("layer4.2.conv3.weight"), "not a ResNet-50"),
        (
            lambda state: state.update({"layer1.0.extra.bias": torch.ones(1), "layer1.0.extra.weight": torch.ones(1)}),
            "extra",
        ),
    ],
)
def test_what_does_not_fit_is_named(slides, tmp_path, capsys, change, words):
    state = slides[0].state_dict()
    change(state)
    torch.save(state, tmp_path / "bad.pth")
    assert main(["import", str(tmp_path / "bad.pth"), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_bias_that_cannot_be_folded():
    with pytest.raises(UserError, match=r"downsample\.0\.bias"):
        convert_to_torchvision({"a.downsample.0.weight": torch.ones(1, 1, 1, 1), "a.downsample.0.bias": torch.ones(1)})


@pytest.mark.parametrize("layout", ["dotted", "wrapped", "references", "timm", "old"])
def test_files_as_others_write_them(tmp_path, layout):
    """torchvision's published DenseNets have dots in their layers' names, DataParallel puts module. before all,
    references keep their options beside, timm says state_dict, and torch before 0.4.1 counted no batches."""
    name = "densenet121" if layout == "dotted" else "resnet18"
    model = lived_in(torchvision.models.get_model(name, num_classes=4))
    own = model.state_dict()
    if layout == "dotted":
        theirs = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", key): value for key, value in own.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in theirs
    elif layout == "wrapped":
        theirs = {f"module.{key}": value for key, value in own.items()}
    elif layout == "references":
        theirs = {"model": own, "args": argparse.Namespace(model=name, lr=0.1), "epoch": 3}
    elif layout == "timm":
        theirs = {"state_dict": own, "arch": name}
    else:
        theirs = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    torch.save(theirs, tmp_path / "theirs.pth")
    assert main(["import", str(tmp_path / "theirs.pth"), str(tmp_path / "run"), "--name", name]) == 0
    kept = torch.load(tmp_path / "run/checkpoints/step-000000000/model.pt", weights_only=True)
    assert all(torch.equal(kept[key], value) for key, value in own.items() if "num_batches" not in key)
    fresh = torchvision.models.get_model(name, num_classes=4)
    start_from(fresh, ModelConfig(name=name, weights=str(tmp_path / "theirs.pth")))
    assert torch.equal(next(fresh.parameters()), next(model.parameters()))


def test_outputs_that_the_data_set_does_not_explain_are_refused(synthetic_root, tmp_path, capsys):
    build_index(synthetic_root)
    torch.save(torchvision.models.squeezenet1_1(num_classes=9).state_dict(), tmp_path / "nine.pth")
    options = ["import", str(tmp_path / "nine.pth"), str(tmp_path / "run"), "--name", "squeezenet1_1"]
    assert main([*options, "--data_root", str(synthetic_root)]) == 2
    assert "has 4 classes and the network 9 outputs" in capsys.readouterr().err
    assert main(options) == 0 and main([*options[:2], str(tmp_path / "other"), "--name", "squeezenet"]) == 2
    assert "--name squeezenet is not a torchvision" in capsys.readouterr().err


def test_means_go_with_googlenets_and_inceptions_weights(synthetic_root, tmp_path):
    """torchvision's published ones expect 0.5; what `export` writes says what it expects, and `import` reads it."""
    build_index(synthetic_root)
    model = torchvision.models.googlenet(num_classes=4, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    assert main(["import", str(tmp_path / "theirs.pth"), str(tmp_path / "one"), "--name", "googlenet"]) == 0
    assert load_config(tmp_path / "one" / "config.yaml").data.mean == (0.5, 0.5, 0.5)
    card = exported(tmp_path / "one", tmp_path / "ours.pth")
    assert card["preprocessing"]["mean"] == card["preprocessing"]["std"] == [0.5, 0.5, 0.5]
    card["preprocessing"] |= {"mean": [0.1, 0.2, 0.3], "center_crop": 96, "resize_shorter_side": 100}
    (tmp_path / "ours.pth.json").write_text(json.dumps(card))
    assert main(["import", str(tmp_path / "ours.pth"), str(tmp_path / "two"), "--name", "googlenet"]) == 0
    data = load_config(tmp_path / "two" / "config.yaml").data
    assert (data.mean, data.val_size, data.val_resize) == ((0.1, 0.2, 0.3), 96, 100)
    from_published = parse_config(["--model.name", "googlenet", "--model.weights", "IMAGENET1K_V1"])
    mean, std = expected_means(from_published)
    pixels = torch.rand(1, 3, 2, 2)
    own = (pixels - torch.tensor(from_published.data.mean).view(3, 1, 1)) / torch.tensor(from_published.data.std).view(
        3, 1, 1
    )
    theirs = torchvision.models.googlenet(transform_input=True, init_weights=False)._transform_input(own)
    torch.testing.assert_close(theirs, (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))


def test_a_network_without_its_auxiliary_heads_goes_out_and_comes_in(synthetic_root, tmp_path, capfd):
    """--model.aux_weight 0, or torchvision's aux_logits=False: the file has none of their weights."""
    build_index(synthetic_root)
    model = torchvision.models.googlenet(num_classes=4, init_weights=False, aux_logits=False)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    capfd.readouterr()
    assert main(["import", str(tmp_path / "theirs.pth"), str(tmp_path / "run"), "--name", "googlenet"]) == 0
    assert "FutureWarning" not in capfd.readouterr().err
    assert load_config(tmp_path / "run" / "config.yaml").model.aux_weight == 0
    exported(tmp_path / "run", tmp_path / "ours.pth")
    assert torch.load(tmp_path / "ours.pth", weights_only=True).keys() == model.state_dict().keys()


def test_a_card_says_the_classes_network_and_resizing(synthetic_root, tmp_path, capsys):
    """Folders named by numbers are in the order of text in training; without their names they would be outputs."""
    build_index(synthetic_root)
    names = sorted(map(str, range(12)))
    torch.save(torchvision.models.squeezenet1_1(num_classes=12).state_dict(), tmp_path / "twelve.pth")
    seen = {"center_crop": 40, "resize_shorter_side": 44, "mean": [0.5] * 3, "std": [0.5] * 3}
    card = {
        "model": "squeezenet1_1",
        "model_kwargs": {"dropout": 0.25},
        "classes": [{"synset": name, "words": name} for name in names],
        "preprocessing": seen | {"interpolation": "bicubic, antialiased"},
    }
    (tmp_path / "twelve.pth.json").write_text(json.dumps(card))
    options = ["import", str(tmp_path / "twelve.pth"), str(tmp_path / "run")]
    assert main([*options, "--data_root", str(synthetic_root)]) == 2
    assert "which the network does not have; its classes are like '0'" in capsys.readouterr().err
    assert main(options) == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.model.name, config.model.kwargs) == ("squeezenet1_1", {"dropout": 0.25})
    assert (config.data.interpolation, config.data.val_size, config.data.val_resize) == ("bicubic", 40, 44)
    assert json.loads((tmp_path / "run/checkpoints/step-000000000/meta.json").read_text())["classes"] == names


def test_whose_order_of_classes_is_meant():
    """torchvision's ImageFolder sorts text, timm by numbers and without regard to capitals."""
    assert order_warning(["1", "2", "3"]) is None and order_warning(["Ant", "Bee"]) is None
    assert "output 1 is '10'; in timm's order it is '2'" in order_warning(["1", "10", "2"])
    assert "output 0 is 'Bee'; in timm's order it is 'ant'" in order_warning(["Bee", "ant"])
    numbers = sorted(map(str, range(1000)))
    assert classes_for(SimpleNamespace(synsets=numbers, num_classes=1000), 1000)[:2] == ["n01440764", "n01443537"]
    assert classes_for(SimpleNamespace(synsets=numbers[:9], num_classes=9), 9) == numbers[:9]


def test_export_says_what_is_wrong(imported, tmp_path, capsys):
    assert main(["export", str(imported), str(tmp_path / "model.h5")]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert main(["export", str(imported), str(tmp_path / "model.pth"), "--checkpoint", "best"]) == 2
    assert "--checkpoint last" in capsys.readouterr().err
    assert main(["import", "nowhere.pth", str(tmp_path / "run")]) == 2
    assert "no such file" in capsys.readouterr().err
    for suffix in (".pth", ".safetensors", ".onnx"):
        (tmp_path / f"folder{suffix}").mkdir()
        assert main(["export", str(imported), str(tmp_path / f"folder{suffix}"), "--checkpoint", "last"]) == 2
        assert "can't be written (Is a directory); give another place" in capsys.readouterr().err
    assert main(["export", str(imported), str(tmp_path / f"{'n' * 300}.pth"), "--checkpoint", "last"]) == 2
    assert "can't be written (File name too long); give another place" in capsys.readouterr().err
    torch.save({0: torch.ones(1)}, tmp_path / "numbers.pth")
    assert main(["import", str(tmp_path / "numbers.pth"), str(tmp_path / "run")]) == 2
    assert "holds no state_dict" in capsys.readouterr().err


def test_a_run_with_no_evaluation_exports_its_newest_checkpoint_and_says_so(imported, tmp_path, capsys):
    assert main(["export", str(imported), str(tmp_path / "model.pth")]) == 0
    assert "has no evaluation, so there is no best checkpoint; the newest one is used" in capsys.readouterr().out
    assert (tmp_path / "model.pth").exists()


def test_a_network_that_asks_for_its_modules_versions_goes_all_the_way(synthetic_root, tmp_path, capsys):
    """MNASNet refuses a state_dict that does not say which version of its modules wrote it."""
    small = ["--data.image_size", "32", "--data.val_size", "32", "--data.val_resize", "32"]
    options = ["--model.name", "mnasnet0_5", "--model.zero_init_residual", "false", "--ema.decay", "0.5", *small]
    build_index(synthetic_root)
    runs.call(synthetic_root, tmp_path / "run", *options, "--checkpoint.every_steps", "1", "--train.max_steps", "1")
    runs.call(synthetic_root, tmp_path / "run", *options, "--checkpoint.every_steps", "1", "--train.max_steps", "2")
    assert [row["step"] for row in runs.rows(tmp_path / "run", "train")] == [1, 2]
    assert main(["evaluate", str(tmp_path / "run"), "--checkpoint", "last"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    exported(tmp_path / "run", tmp_path / "out.pth")
    model = torchvision.models.mnasnet0_5(num_classes=4)
    model.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    weights = ["--model.weights", str(tmp_path / "run" / "checkpoints" / "step-000000002")]
    runs.call(synthetic_root, tmp_path / "other", *options, *weights, "--train.max_steps", "1")


@pytest.fixture(scope="module")
def blurred(synthetic_root, tmp_path_factory):
    """A run of ResNet-18 with BlurPool, and its data set."""
    build_index(synthetic_root)
    run = tmp_path_factory.mktemp("blurred") / "run"
    runs.call(synthetic_root, run, "--model.blurpool", "all", "--train.max_steps", "2")
    return run


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx"])
def test_an_export_with_blurpool_is_no_plain_network(blurred, tmp_path, capsys, suffix):
    """Blurring has no weights: without a mark torchvision's network would load the file and compute something else."""
    out = tmp_path / f"net{suffix}"
    assert main(["export", str(blurred), str(out)]) == 0
    said = capsys.readouterr().out
    assert "checked: read back, the file gives the same logits for 24 validation images" in said
    assert "not torchvision's resnet18: BlurPool (all)" in said
    card = json.loads(out.with_name(out.name + ".json").read_text())
    assert card["changes_to_torchvisions_network"] == {"blurpool": "all"}
    assert card["scores_are_means_with_mirrored_images"] is False
    if suffix == ".onnx":
        return
    state = torch.load(out, weights_only=True) if suffix == ".pth" else load_file(out)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*pipeline\.blurpool\.all"):
        torchvision.models.resnet18(num_classes=4).load_state_dict(state)
    other = ModelConfig(name="resnet18", weights=str(out))
    with pytest.raises(UserError, match=r"--model\.weights .*net.*give --model\.blurpool all"):
        start_from(build_model(other, 4), other)
    start_from(build_model(same := replace(other, blurpool="all"), 4), same)
    assert main(["import", str(out), str(tmp_path / "imported"), "--name", "resnet18"]) == 0
    assert load_config(tmp_path / "imported" / "config.yaml").model.blurpool == "all"


def test_a_checkpoint_with_blurpool_starts_no_plain_network(blurred):
    checkpoint = str(runs.checkpoint_at(blurred, 2))
    plain = ModelConfig(name="resnet18", weights=checkpoint)
    with pytest.raises(UserError, match=r"give --model\.blurpool all"):
        start_from(build_model(plain, 4), plain)
    start_from(build_model(same := replace(plain, blurpool="all"), 4), same)


def test_an_export_that_computes_something_else_is_refused(blurred, tmp_path, capsys, monkeypatch):
    """As it was before the mark: the file is loaded into the plain network, whose logits differ."""
    monkeypatch.setattr("pipeline.evaluation.export_weights.mark_blurpool", lambda state, blurpool: None)
    assert main(["export", str(blurred), str(tmp_path / "net.pth")]) == 2
    assert "its logits differ from the run's network" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
