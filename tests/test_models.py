"""What the lessons change of a network: heads, auxiliary losses, transfer, frozen parts, drop-out, penalties."""

import copy

import pytest
import runs
import torch
import torchvision
from torch import nn

from pipeline.config import ModelConfig, OptimConfig, from_dict, parse_config
from pipeline.errors import UserError
from pipeline.model.build import build_model
from pipeline.model.heads import find_heads, frozen_norms
from pipeline.model.meta_init import meta_init
from pipeline.model.sizes import check_image_sizes
from pipeline.model.weights import start_from
from pipeline.training.optim.loss import make_loss
from pipeline.training.optim.optimizer import parameter_groups

HEADS = {
    "resnet18": ("fc",),
    "vgg19": ("classifier.6",),
    "densenet121": ("classifier",),
    "squeezenet1_1": ("classifier.1",),
    "vit_b_16": ("heads.head",),
    "inception_v3": ("AuxLogits.fc", "fc"),
    "googlenet": ("aux1.fc2", "aux2.fc2", "fc"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found_whatever_they_are_called(name):
    assert set(find_heads(name)) == set(HEADS[name])


def meta(**settings) -> nn.Module:
    with torch.device("meta"):
        return build_model(ModelConfig(**settings), 1000)


def test_inception_has_the_lectures_parameters_and_both_heads_for_the_classes():
    assert sum(p.numel() for p in meta(name="inception_v3").parameters()) == 27_161_264
    assert not any(name.startswith("Aux") for name, _ in meta(name="inception_v3", aux_weight=0).named_parameters())
    with torch.device("meta"):
        model = build_model(ModelConfig(name="inception_v3"), 10).train()
        outputs = model(torch.empty(2, 3, 299, 299))
        assert [tuple(output.shape) for output in outputs] == [(2, 10), (2, 10)]
        assert tuple(model.eval()(torch.empty(2, 3, 299, 299)).shape) == (2, 10)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "vit_b_16", "swin_v2_t", "mobilenet_v3_small"])
def test_a_network_without_data_has_the_shapes_of_the_real_one(name):
    """RegNet computes its widths with tensors, so these have to be real."""
    with meta_init():
        blank = torchvision.models.get_model(name, weights=None)
    real = torchvision.models.get_model(name, weights=None)
    assert all(tensor.is_meta for tensor in blank.state_dict().values())
    assert {k: v.shape for k, v in blank.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
    assert not any(tensor.is_meta for tensor in real.state_dict().values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("inception_v3 image_size=298", "--data.image_size 298: inception_v3 with its auxiliary head can't take such"),
        ("inception_v3 image_size=298", "give at least 299, or --model.aux_weight 0"),
        (
            "inception_v3 image_size=299 val_size=74",
            "--data.val_size 74: inception_v3 can't take images of 74 px; give at least 75",
        ),
        ("vit_b_16 image_size=192", "--data.image_size 192: vit_b_16 can't take such images; give 224"),
        ("vgg16 start_size=20 ramp_epochs=[1,2]", "--data.start_size 20: vgg16 .* give at least 32"),
    ],
)
def test_a_size_that_the_network_cannot_take_is_said_with_one_that_it_can(options, said):
    name, *sizes = options.split()
    with pytest.raises(UserError, match=said):
        check_image_sizes(parse_config(["--model.name", name, *(f"--data.{size}" for size in sizes)]))


def test_a_vision_transformer_is_built_for_the_images_of_the_weights_that_it_starts_from():
    finer = ["--model.name", "vit_b_16", "--model.weights", "IMAGENET1K_SWAG_E2E_V1"]
    with meta_init():
        model = build_model(parse_config(finer).model, 1000)
    assert model.encoder.pos_embedding.shape[1] == 1 + (384 // 16) ** 2
    check_image_sizes(parse_config([*finer, "--data.image_size", "384"]))
    with pytest.raises(UserError, match=r"--data.image_size 224: vit_b_16 can't take such images; give 384"):
        check_image_sizes(parse_config(finer))


def test_sizes_that_the_network_takes_pass():
    for options in (["inception_v3"], ["vit_b_16"], ["inception_v3", "--model.aux_weight=0", "--data.image_size=96"]):
        check_image_sizes(parse_config(["--model.name", *options]))


@pytest.mark.parametrize(
    ("name", "weight", "expected"), [("inception_v3", None, 0.4), ("googlenet", None, 0.3), ("googlenet", 1.0, 1.0)]
)
def test_auxiliary_losses_count_with_their_weight(name, weight, expected):
    config = from_dict({"model": ModelConfig(name=name, aux_weight=weight)})
    loss = make_loss(config, nn.Linear(1, 1))
    main, other = torch.randn(2, 4, 5)
    targets = torch.tensor([0, 1, 2, 3])
    entropy = nn.functional.cross_entropy
    both = entropy(main, targets) + expected * entropy(other, targets)
    torch.testing.assert_close(loss((main, other), targets), both)
    torch.testing.assert_close(loss(main, targets), entropy(main, targets))


def test_an_auxiliary_weight_needs_an_auxiliary_head():
    with pytest.raises(UserError, match=r"aux_weight.*resnet18 has no auxiliary head"):
        make_loss(from_dict({"model": ModelConfig(name="resnet18", aux_weight=0.3)}), nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("inception_v3", (299, 299, 342)), ("resnet18", (224, 224, 256)), ("efficientnet_b4", (380, 380, 434))],
)
def test_the_input_size_is_the_networks(name, sizes):
    data = parse_config(["--model.name", name]).data
    assert (data.image_size, data.val_size, data.val_resize) == sizes
    data = parse_config(["--model.name", name, "--data.image_size", "64"]).data
    assert (data.image_size, data.val_size, data.val_resize) == (64, 64, 73)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A ResNet-18 for 7 classes, and the file of its state_dict."""
    torch.manual_seed(3)
    model = torchvision.models.resnet18(num_classes=7)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.mark.parametrize("classes", [7, 10])
def test_transfer_takes_the_body_and_a_head_that_fits(trained, classes):
    source, path = trained
    config = ModelConfig(name="resnet18", weights=str(path))
    model = build_model(config, classes)
    fresh = copy.deepcopy(model.fc.weight)
    start_from(model, config)
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(model.fc.weight, source.fc.weight if classes == 7 else fresh)


def test_weights_that_do_not_fit_are_named(trained, tmp_path):
    _, path = trained
    for name, word in (("resnet34", "layer1.2.conv1.weight is missing"), ("vgg11", "conv1.weight is not in vgg11")):
        with pytest.raises(UserError, match=word):
            start_from(build_model(ModelConfig(name=name), 7), ModelConfig(name=name, weights=str(path)))
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        start_from(build_model(ModelConfig(name="resnet18"), 7), ModelConfig(name="resnet18", weights="IMAGENET9"))
    with pytest.raises(UserError, match="no such file"):
        start_from(build_model(ModelConfig(name="resnet18"), 7), ModelConfig(name="resnet18", weights="./none.pth"))


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        from pathlib import Path

        return Path.touch, (self.path,)


def test_weights_are_never_unpickled(tmp_path):
    torch.save({"fc.weight": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="read safely"):
        start_from(
            build_model(ModelConfig(name="resnet18"), 7),
            ModelConfig(name="resnet18", weights=str(tmp_path / "bomb.pth")),
        )
    assert not (tmp_path / "ran").exists()


def test_freezing_the_body_leaves_the_head_and_holds_statistics():
    model = build_model(ModelConfig(name="resnet18", freeze="body"), 7)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    assert len(frozen_norms(model)) == 20
    model = build_model(ModelConfig(name="resnet18", freeze="conv1.*, layer1.*"), 7)
    assert not model.layer1[0].bn1.weight.requires_grad and model.layer2[0].bn1.weight.requires_grad
    assert len(frozen_norms(model)) == 4
    for patterns, words in (("layer9.*", "layer9.* names no parameter"), ("*", "nothing to train")):
        with pytest.raises(UserError) as caught:
            build_model(ModelConfig(name="resnet18", freeze=patterns), 7)
        assert words in str(caught.value)


def test_the_body_gets_its_share_of_the_rate():
    model = build_model(ModelConfig(name="resnet18"), 7)
    groups = parameter_groups(model, OptimConfig(body_lr_factor=0.1, weight_decay=0.5), find_heads("resnet18"))
    head = {id(p) for group in groups if group["lr_factor"] == 1 for p in group["params"]}
    assert head == {id(model.fc.weight), id(model.fc.bias)}
    assert {group["lr_factor"] for group in groups} == {0.1, 1.0}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_drop_out_before_the_head_in_training_only():
    model = build_model(ModelConfig(name="resnet18", dropout=0.5), 7)
    assert model.state_dict().keys() == torchvision.models.resnet18(num_classes=7).state_dict().keys()
    seen = []
    model.fc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.rand(8, 3, 64, 64)
    model.train()(images)
    model.eval()(images)
    dropped, kept = ((values == 0).float().mean().item() for values in seen)
    assert 0.4 < dropped < 0.7 and kept < 0.2


def test_penalties_as_the_slides_define_them():
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, -3.0)
    nn.init.constant_(layer.bias, 2.0)
    logits, targets = torch.zeros(1, 2), torch.tensor([0])
    plain = nn.functional.cross_entropy(logits, targets).item()
    l1 = make_loss(from_dict({"optim": OptimConfig(l1=0.1)}), layer)(logits, targets)
    assert l1.item() == pytest.approx(plain + 0.1 * 8)
    l2 = make_loss(from_dict({"optim": OptimConfig(l2=0.1)}), layer)(logits, targets)
    assert l2.item() == pytest.approx(plain + 0.1 / 2 * (9 + 9 + 4))
    l2.backward()
    assert layer.weight.grad.tolist() == [pytest.approx([-0.3, -0.3])]


def test_transfer_resumes_bit_identically(root, trained, tmp_path):
    options = ["--model.weights", str(trained[1]), "--model.freeze", "conv1.*,bn1.*,layer1.*", "--model.dropout", "0.3"]
    options += ["--optim.body_lr_factor", "0.1", "--optim.l1", "1e-5", "--optim.l2", "1e-4"]
    options += ["--model.zero_init_residual", "false"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.call(root, whole, *options, "--train.max_steps", "6")
    runs.call(root, cut, *options, "--train.max_steps", "3")
    runs.call(root, cut, *options, "--train.max_steps", "6")
    assert runs.repeatable(cut) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(cut, 6), runs.checkpoint_at(whole, 6))
    weights = torch.load(runs.checkpoint_at(cut, 6) / "model.pt", weights_only=True)
    source = trained[0].state_dict()
    for key in ("conv1.weight", "layer1.0.bn1.running_mean"):
        assert torch.equal(weights[key], source[key])  # started there, and stayed
    assert not torch.equal(weights["layer2.0.conv1.weight"], source["layer2.0.conv1.weight"])


def test_two_ranks_start_from_the_same_weights(root, trained, tmp_path):
    options = ["--model.weights", str(trained[1]), "--model.freeze", "body", "--train.max_steps", "2"]
    runs.train(root, tmp_path / "run", *options, "--model.zero_init_residual", "false", processes=2)
    weights = torch.load(runs.checkpoint_at(tmp_path / "run", 2) / "model.pt", weights_only=True)
    source = trained[0].state_dict()
    assert all(torch.equal(weights[key], source[key]) for key in source if not key.startswith("fc."))
