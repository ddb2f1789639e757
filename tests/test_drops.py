"""Drop-out and stochastic depth by keys: their rates, and that neither history nor the number of ranks matters."""

import copy

import pytest
import runs
import torch
import torchvision
from torch import nn

from pipeline.config import ModelConfig, parse_config
from pipeline.model.build import build_model
from pipeline.model.drops import Drop, keyed_uniform, tie_drops


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**32, (count,), generator=torch.Generator().manual_seed(seed))


def test_draws_are_uniform_and_independent():
    draws = keyed_uniform(keys(2000), 3, 500)
    assert draws.dtype == torch.float32 and draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, 64, 0, 1) / draws.numel() * 64
    assert (counts - 1).abs().max() < 0.05  # 8 standard deviations
    assert abs(draws.mean() - 0.5) < 0.002 and abs(draws.var() - 1 / 12) < 0.001
    other = keyed_uniform(keys(2000), 4, 500)
    following = keyed_uniform(keys(2000) ^ 1, 3, 500)
    for a, b in ((draws, other), (draws, following), (draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.006


@pytest.mark.parametrize("rows", [False, True])
def test_a_drop_keeps_the_mean_and_drops_its_share(rows):
    drop = Drop(0.3, rows)
    drop.drop_keys.keys = keys(4000)
    seen = drop.drop(torch.ones(4000, 6, 2))
    assert seen.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs((seen == 0).float().mean() - 0.3) < 0.03
    assert rows == torch.equal(seen.amin((1, 2)), seen.amax((1, 2)))


@pytest.mark.parametrize("name", ["alexnet", "convnext_tiny"])
def test_halves_of_a_batch_drop_what_the_whole_does(name):
    """As two ranks, or two micro batches, each of which has the keys of its places."""
    torch.manual_seed(0)
    settings = {"stochastic_depth": 0.5} if name == "convnext_tiny" else {}
    model = build_model(ModelConfig(name=name, dropout=0.2, **settings), 5).train()
    images, places = torch.rand(4, 3, 64, 64), keys(4)

    def logits(part: slice) -> torch.Tensor:
        model.drop_keys.keys = places[part]
        return model(images[part])

    with torch.no_grad():
        whole, halves = logits(slice(0, 4)), torch.cat([logits(slice(0, 2)), logits(slice(2, 4))])
        torch.testing.assert_close(whole, halves)
        model.drop_keys.keys = keys(4, seed=1)
        assert not torch.allclose(whole, model(images))
        model.eval()
        plain = getattr(torchvision.models, name)(num_classes=5).eval()
        plain.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(images), plain(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_draws_of_all_layers_together_are_those_of_each_alone(dtype):
    """Bit for bit, as each layer drew its own: a run may resume from a checkpoint of an older version."""
    shares = [0.001 + 0.0137 * number for number in range(50)]
    model = nn.Sequential(*[nn.Identity() for _ in shares]).train()
    for layer, share in zip(model, shares, strict=True):
        layer.register_forward_hook(Drop(share, rows=True))
    drop_keys = tie_drops(model)
    drop_keys.keys = keys(256)
    x = torch.rand(256, 3, 2, 2).to(dtype)
    for number, (layer, share) in enumerate(zip(model, shares, strict=True)):
        kept = keyed_uniform(drop_keys.keys, number, 1) >= share
        assert torch.equal(layer(x), x * (kept.to(dtype) / (1 - share)).view(256, 1, 1, 1)), share


def test_stochastic_depth_costs_few_operators():
    """A GPU waits for the host where a forward pass is many small kernels."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    config = parse_config(["--config", "resnet152"]).model
    assert config.stochastic_depth > 0
    model = build_model(config, 10).train()
    counts = []
    for step in range(2):
        model.drop_keys.keys = keys(2, seed=step)
        with torch.no_grad(), Count() as count:  # autograd would add views, which start no kernel
            model(torch.rand(2, 3, 32, 32))
        counts.append(count.calls)
    assert max(counts) <= 950, counts


def test_layers_of_torchvision_follow_the_keys_and_a_copy_has_its_own():
    model = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Dropout(0.0), nn.Dropout(0.25)).train()
    drop_keys = tie_drops(model)
    twin = copy.deepcopy(model)
    drop_keys.keys = keys(64)
    x = torch.ones(64, 3, 4)
    assert torch.equal(model(x), model(x))
    assert (model(x) == 0).float().mean() == pytest.approx(
        1 - 0.5 * 0.75, abs=0.06
    )  # one layer's draws are not the other's
    assert twin[0]._forward_hooks[next(iter(twin[0]._forward_hooks))].drop_keys.keys is None
    assert tie_drops(nn.Sequential(nn.ReLU())) is None


@pytest.mark.parametrize(
    ("name", "depth", "branches"),
    [
        ("swin_t", "stochastic_depth", ("attn", "mlp")),
        ("swin_v2_t", "stochastic_depth", ("norm1", "norm2")),
        ("maxvit_t", "stochastic_dropout", ("attn_layer", "mlp_layer")),
    ],
)
def test_the_two_branches_of_an_attention_block_are_dropped_by_draws_of_their_own(name, depth, branches):
    model = build_model(ModelConfig(name=name, stochastic_depth=0.5), 3).train()
    model.drop_keys.keys = keys(400)
    block = [module for module in model.modules() if hasattr(module, depth) and hasattr(module, branches[0])][-1]
    dropped = []  # by the network's last block, where the rate is 0.5
    for end in (getattr(block, branch) for branch in branches):
        (hook,) = end._forward_hooks.values()
        dropped.append(hook(end, (), torch.ones(400, 1, 1, 2))[:, 0, 0, 0] == 0)
    assert getattr(block, depth).p == 0 and not getattr(block, depth)._forward_hooks
    assert all(0.4 < each.float().mean() < 0.6 for each in dropped)
    assert 0.15 < (dropped[0] & dropped[1]).float().mean() < 0.35


def test_a_compiled_network_takes_new_keys_without_a_new_compilation():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    drop_keys = tie_drops(model)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, keys):
            drop_keys.keys = keys
            return self.model(x)

    net, x = Net(), torch.ones(8, 16)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            assert torch.equal(compiled(x, keys(8, seed)), net(x, keys(8, seed)))


def test_the_networks_mode_counts_and_not_a_layers():
    """BatchNorm is in training mode by itself when its statistics are recomputed, in evaluation mode when frozen."""
    model = build_model(ModelConfig(name="resnet18", stochastic_depth=0.9), 5).eval()
    plain = torchvision.models.resnet18(num_classes=5).eval()
    plain.load_state_dict(model.state_dict())
    norms = [module for network in (model, plain) for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    model.drop_keys.keys, images = keys(2), torch.rand(4, 3, 32, 32)
    for norm in norms:
        norm.train()
    assert torch.equal(model(images), plain(images))
    for network in (model, plain):
        network.train()
    model.drop_keys.keys = keys(4)
    for norm in norms:
        norm.eval()
    assert not torch.allclose(model(images), plain(images))


@pytest.mark.slow
def test_two_ranks_drop_what_one_does(synthetic_root, tmp_path):
    """A network without BatchNorm, half of whose last values are dropped: the losses agree to rounding."""
    options = ["--model.name", "squeezenet1_1", "--model.zero_init_residual", "false", "--train.precision", "fp32"]
    options += ["--train.max_steps", "2", "--data.image_size", "64"]
    runs.call(synthetic_root, tmp_path / "one", *options)
    runs.train(synthetic_root, tmp_path / "two", *options, processes=2)
    one, two = ([row["loss"] for row in runs.rows(tmp_path / run, "train")] for run in ("one", "two"))
    assert len(one) == 2 and one == pytest.approx(two, rel=2e-4)
