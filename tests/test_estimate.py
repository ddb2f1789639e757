"""What `estimate` says of networks before a GPU is touched, against published and hand-counted figures."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from pipeline.__main__ import main
from pipeline.config import parse_config
from pipeline.insight.estimate.gpus import find_card
from pipeline.insight.estimate.memory import MIB, STATE_COPY, run_memory, step_memory
from pipeline.insight.estimate.trace import Tracer
from pipeline.insight.qualify.peers import LECTURE_IMAGES_PER_S, LECTURE_MIB
from pipeline.model.build import build_model
from pipeline.training.optim.optimizer import values_per_parameter


@pytest.fixture
def estimate(capsys):
    """Run the verb; returns what its JSON says."""

    def call(*options: str) -> dict:
        assert main(["estimate", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_the_slides_resnet152(estimate):
    options = ["--model.name", "resnet152", "--train.precision", "fp32", "--conv_bias", "--card", "a6000"]
    facts = estimate(
        *options, "--batches", ",".join(map(str, LECTURE_MIB)), "--images_per_s", str(LECTURE_IMAGES_PER_S)
    )
    assert facts["parameters"] == 60_268_520
    assert facts["weights_mib"] + facts["gradients_mib"] + facts["optimizer_mib"] == pytest.approx(689.71, rel=2e-3)
    assert facts["image_mib"] == pytest.approx(169.5, rel=3e-3)
    assert facts["weights_file_mib"] == pytest.approx(231, rel=5e-3)
    for batch, mib in facts["card_mib_by_batch"].items():
        assert mib == pytest.approx(LECTURE_MIB[int(batch)], rel=0.1), batch
    assert facts["largest_batch_of_step"] == 256  # the largest of the slides' table, which filled the card
    assert facts["epoch_s"] == pytest.approx(1_281_167 / LECTURE_IMAGES_PER_S)
    assert facts["roofline_epoch_s"] < facts["epoch_s"]
    assert facts["forward_flops"] == pytest.approx(
        2 * 11.514e9, rel=1e-3
    )  # torchvision publishes 11.51 G multiply-adds
    assert facts["training_flops"] == pytest.approx(3 * facts["forward_flops"], rel=0.02)


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [("vgg16", 10, 134_301_514), ("densenet121", 1000, 7_978_856), ("resnet18", 1000, 11_689_512)],
)
def test_the_lectures_parameters(name, classes, parameters):
    with torch.device("meta"):
        model = build_model(parse_config(["--model.name", name]).model, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),  # as torchvision publishes them
    [("regnet_y_400mf", 4_344_144, 0.402e9), ("efficientnet_b0", 5_288_548, 0.386e9), ("vgg16", 138_357_544, 15.47e9)],
)
def test_training_takes_three_forward_passes_whatever_the_convolutions_groups(
    estimate, name, parameters, multiply_adds
):
    facts = estimate("--model.name", name, "--batches", "1")
    assert facts["parameters"] == parameters
    assert facts["forward_flops"] == pytest.approx(2 * multiply_adds, rel=5e-3)
    assert facts["training_flops"] == pytest.approx(3 * facts["forward_flops"], rel=0.03)


def small(*options: str):
    return parse_config(["--model.name", "resnet18", "--data.image_size", "64", *options])


def test_a_hand_counted_layer_chain(monkeypatch):
    """Two convolutions with BatchNorm and an in-place ReLU between them: each tensor that backward needs, by hand."""

    def chain(*_):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 4, 3, padding=1, bias=False),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    monkeypatch.setattr("pipeline.insight.estimate.trace.build_model", chain)
    memory = step_memory(Tracer(small("--train.precision", "fp32", "--data.image_size", "32"), 4), 8)
    pixels = 32 * 32
    image, first, normed, logits = 3 * pixels, 8 * pixels, 8 * pixels, 4  # first: before BatchNorm; normed: after ReLU
    assert memory.image_mib * MIB == 4 * (image + first + normed + logits) + 8  # + the label
    weights = 27 * 8 + 16 + 72 * 4
    assert memory.gradients_mib * MIB == memory.optimizer_mib * MIB == 4 * weights
    assert memory.weights_mib * MIB == 4 * (weights + 16) + 8  # + running statistics and their counter


def test_a_hand_counted_roofline(monkeypatch):
    """Convolution, BatchNorm and in-place ReLU, forward and backward: the bytes of each kernel, by hand."""

    def chain(*_):
        conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setattr("pipeline.insight.estimate.trace.build_model", chain)
    images = 4
    trace = Tracer(small("--train.precision", "fp32", "--data.image_size", "32"), 8).trace(images)
    image, maps, weight, channels = 3 * images * 32 * 32, 8 * images * 32 * 32, 8 * 3 * 9, 8
    moved = {op.name: op.moved for op in trace.operations}
    by_hand = {
        "convolution": image + weight + maps,
        "native_batch_norm": 2 * maps + 6 * channels,  # gamma, beta, running statistics; mean and deviation saved
        "relu_": 2 * maps,
        "threshold_backward": 3 * maps,  # the gradient, what ReLU gave, the gradient before it
        "native_batch_norm_backward": 3 * maps + 7 * channels,
        "convolution_backward": image + maps + 2 * weight,  # the image needs no gradient
    }
    assert {name: moved[name] for name in by_hand} == {name: 4 * values for name, values in by_hand.items()}
    assert not {"device", "empty"} & set(moved)  # a question to a tensor and an allocation are no kernels
    ideal = sum(4 * values for values in by_hand.values()) / 1e9
    assert ideal < trace.seconds(1e9, 1e9, 1.0) < 1.4 * ideal  # the rest: bytes to floats, pool, loss


def test_the_roofline_of_resnets():
    """ResNet-152 takes 2.2 times as long as ResNet-50 on every card: published throughputs differ by 2.1 to 2.4."""
    steps = {name: Tracer(parse_config(["--model.name", name]), 1000).trace(64) for name in ("resnet50", "resnet152")}
    for card in (find_card("h100"), find_card("a100-80gb")):
        fifty, more = (step.seconds(card.half_tflops, card.tflops, card.gb_s) / step.images for step in steps.values())
        assert more / fifty == pytest.approx(2.2, abs=0.15)
    h100 = find_card("h100")
    rate = 64 / steps["resnet152"].seconds(h100.half_tflops, h100.tflops, h100.gb_s)
    assert 3200 < rate < 4000  # images/s


def test_the_measured_fp32_ceiling_is_that_of_convolutions(monkeypatch):
    from pipeline.insight.bench.precision import products_as_convolutions

    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32
    for allowed in (True, False):
        monkeypatch.setattr(convolutions, "allow_tf32", allowed)
        with products_as_convolutions():
            assert products.allow_tf32 is allowed
        assert products.allow_tf32 is before


def test_bf16_keeps_half_and_copies_of_the_weights():
    whole, half = (step_memory(Tracer(small("--train.precision", p), 10), 8) for p in ("fp32", "bf16"))
    assert 0.49 < half.image_mib / whole.image_mib < 0.55
    assert half.kept_mib - whole.kept_mib == pytest.approx(whole.gradients_mib / 2, rel=0.01)
    assert half.weights_mib == whole.weights_mib


def test_channels_last_keeps_the_same_bytes():
    rows, columns = (step_memory(Tracer(small("--train.channels_last", v), 10), 8) for v in ("true", "false"))
    assert rows.image_mib == pytest.approx(columns.image_mib, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "states"), [([], 1), (["--optim.momentum", "0"], 0), (["--optim.name", "adamw"], 2)]
)
def test_optimizer_states_are_counted(options, states):
    config = small(*options)
    assert values_per_parameter(config.optim) == states
    memory = step_memory(Tracer(config, 10), 8)
    assert memory.optimizer_mib == states * memory.gradients_mib


def test_layers_sum_to_the_whole(estimate):
    facts = estimate(
        "--model.name", "resnet18", "--data.image_size", "64", "--layers", "--train.global_batch_size", "8"
    )
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert sum(layer["parameters"] for layer in facts["layers"]) == facts["parameters"] == 11_689_512
    assert sum(layer["forward_flops"] for layer in facts["layers"]) == facts["forward_flops"]
    assert layers["conv1"]["output"] == [64, 32, 32]
    assert layers["conv1"]["forward_flops"] == 2 * 64 * 32 * 32 * 3 * 49
    assert layers["layer2.0.downsample.0"]["parameters"] == 64 * 128


def test_any_family_can_be_traced():
    """Drawn initial weights (ViT), attention, residual concatenation."""
    for name in ("vit_b_16", "densenet121", "mobilenet_v3_small"):
        config = parse_config(["--model.name", name])
        assert Tracer(config, 10).trace(2).kept > 0


def test_the_largest_batch_is_the_last_that_fits():
    memory = step_memory(Tracer(small(), 10), 8)
    most = memory.most_images(8192)
    assert memory.card_mib(most) <= 8192 < memory.card_mib(most + 1)
    assert memory.most_images(1000) == 0


def test_what_a_run_has_beside_its_step_is_named_and_counts():
    """The largest batch leaves room for it, and a reserve."""
    config = parse_config(["--model.name", "resnet18", "--data.image_size", "64", "--train.global_batch_size", "64"])
    memory = step_memory(Tracer(config, 10), 8)
    alone, many = (run_memory(memory, config, size) for size in (1, 4))
    copied = memory.weights_mib + memory.optimizer_mib
    assert alone.parts["copy of the state while a checkpoint is saved"] == copied
    assert set(many.parts) - set(alone.parts) == {"buffers of NCCL"}
    assert alone.by_name(8)["DALI's pool"] == alone.by_name(64)["DALI's pool"] > many.by_name(8)["DALI's pool"] > 0
    reference = run_memory(
        memory, dataclasses.replace(config, data=dataclasses.replace(config.data, loader="reference")), 1
    )
    assert "DALI's pool" not in reference.by_name(8)
    train = dataclasses.replace(config.train, compile=True, cuda_graphs=True)
    graphs = run_memory(memory, dataclasses.replace(config, train=train), 1)
    assert graphs.by_name(8)["pool of CUDA graphs"] == pytest.approx(0.1 * memory.allocated_mib(8))
    most = alone.most_images(8192)
    assert alone.card_mib(most) <= 0.95 * 8192 < alone.card_mib(most + 1) and most < memory.most_images(8192)
    assert alone.most_images(1000) == 0


def test_what_is_assumed_is_marked(capsys):
    assert main(["estimate", "--model.name", "resnet18", "--data.image_size", "64", "--world_size", "2"]) == 0
    said = capsys.readouterr().out
    marked = re.findall(r"^ +[\d,.]+  (.*) \(assumed, not measured\)$", said, re.MULTILINE)
    assert marked == ["workspaces of cuDNN", "buffers of NCCL", "DALI's pool"] and f"{STATE_COPY}\n" in said


def test_time_from_a_run(estimate, tmp_path):
    rows = [{"kind": "train", "step": step, "images_per_s": 500.0} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = estimate("--model.name", "resnet18", "--data.image_size", "32", "--run", str(tmp_path))
    assert facts["epoch_s"] == pytest.approx(1_281_167 / 500) and facts["world_size"] == 1
    start = {"kind": "event", "event": "started", "time": 1.0, "world_size": 4}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [start, *rows]))
    (tmp_path / "config.yaml").write_text("model: {name: squeezenet1_1}\ndata: {image_size: 64}\n")
    facts = estimate("--run", str(tmp_path))  # the run's own recipe, and the processes that it was measured on
    assert (facts["model"], facts["image_size"], facts["world_size"]) == ("squeezenet1_1", 64, 4)
    assert facts["epoch_s"] == pytest.approx(1_281_167 / 500)


@pytest.mark.parametrize("name", ["RTX A6000", "NVIDIA A6000", "a6000", "H100", "rtx 4090", "A100 80GB"])
def test_cards_as_they_are_called(name):
    assert find_card(name).memory_mib in (49_140, 81_559, 24_564, 81_920)


@pytest.mark.parametrize("name", ["RTX 5090", "NVIDIA B200", "L4", "NVIDIA RTX 6000 Ada"])
def test_cards_of_a_later_list(name):
    assert find_card(name).memory_mib in (32_607, 183_359, 23_034, 49_140)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--card", "a7000"], ["a7000", "a6000"]),
        (["--card", "MI300X"], ["MI300X", "AMD", "h100"]),
        (["--batches", "1,x"], ["--batches", "1,x"]),
        (["--run", "/nowhere"], ["/nowhere", "metrics.jsonl"]),
        (["--model.name", "resnet125"], ["resnet125", "resnet152"]),
        (["--card_mib", "much"], ["--card_mib much", "give a number"]),
    ],
)
def test_bad_options_are_one_line(capsys, options, words):
    try:
        code = main(["estimate", "--model.name", "resnet18", *options])
    except SystemExit as error:  # of the parser
        code = error.code
    assert code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_against_the_card(precision):
    """Tensors of one real training step, as CUDA's allocator counts them."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from pipeline.model.build import Normalized
    from pipeline.training.optim.loss import make_loss
    from pipeline.training.optim.optimizer import make_optimizer
    from pipeline.training.step import autocast

    config = parse_config(["--model.name", "resnet50", "--train.precision", precision])
    memory = step_memory(Tracer(config, 1000), 64)
    device = torch.device("cuda")
    model = build_model(config.model, 1000)
    network = Normalized(model, config.data.mean, config.data.std, config.train.channels_last).to(device).train()
    optimizer, loss_of = make_optimizer(model, config.optim), make_loss(config, model)
    images = torch.zeros(64, 224, 224, 3, dtype=torch.uint8, device=device)
    targets = torch.zeros(64, dtype=torch.int64, device=device)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with autocast(device, precision):
            loss = loss_of(network(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert memory.allocated_mib(64) == pytest.approx(torch.cuda.max_memory_allocated() / MIB, rel=0.05)
