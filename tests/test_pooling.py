"""The deterministic gradient of adaptive average pooling, put in place of torch's on a CPU."""

import os

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.config import ModelConfig, TrainConfig
from pipeline.model import pooling
from pipeline.model.build import build_model
from pipeline.training.ranks.world import start_world


def pooled(shape, output, dtype=torch.float32):
    """(output, gradient by the input) of a random input, channels last."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    found = adaptive_avg_pool2d(images, output)
    found.backward(torch.randn(found.shape, generator=generator).to(dtype))
    return found.detach(), images.grad


@pytest.fixture
def replaced(monkeypatch):
    """A function that calls another with the gradient replaced, and counts how often it was asked for."""
    calls = []
    ours = pooling.adaptive_avg_pool2d_backward
    monkeypatch.setattr(pooling, "adaptive_avg_pool2d_backward", lambda *args: calls.append(1) or ours(*args))

    def call(function, *arguments):
        library = pooling.use_deterministic_pooling("CPU")
        try:
            return function(*arguments), len(calls)
        finally:
            library._destroy()
            pooling.use_deterministic_pooling.cache_clear()

    return call


def test_a_second_run_of_a_process_may_ask_for_it_again(replaced):
    """There is one replacement: torch 2.11 refuses a second."""
    (first, second, _), calls = replaced(
        lambda: [*(pooling.use_deterministic_pooling("CPU") for _ in range(2)), pooled((1, 2, 6, 6), 3)]
    )
    assert first is second and calls == 1


def test_each_run_of_a_process_is_deterministic_or_not_as_it_says(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # put back at the end
    for wanted in (True, False):
        start_world(TrainConfig(device="cpu", deterministic=wanted)).close()
        assert torch.are_deterministic_algorithms_enabled() == wanted


@pytest.mark.parametrize(
    ("side", "output"), [((12, 12), 6), ((7, 7), 7), ((14, 14), 4), ((13, 9), (6, 7)), ((1, 2), 7), ((5, 6), (5, 3))]
)
def test_forward_is_torchs_and_the_gradient_too(replaced, side, output):
    """Where the sizes divide bit for bit; where windows overlap an input's sum may be in another order."""
    expected = pooled((2, 3, *side), output)
    found, calls = replaced(pooled, (2, 3, *side), output)
    assert calls == 1 and torch.equal(found[0], expected[0])
    outputs = (output, output) if isinstance(output, int) else output
    if all(inputs % wanted == 0 for inputs, wanted in zip(side, outputs, strict=True)):
        assert torch.equal(found[1], expected[1])
    assert torch.allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    half, _ = replaced(pooled, (2, 3, *side), output, torch.bfloat16)
    assert half[1].dtype == torch.bfloat16


def test_gradcheck_of_the_replaced_kernel(replaced):
    images = torch.randn(1, 2, 7, 5, dtype=torch.float64).requires_grad_()
    good, calls = replaced(torch.autograd.gradcheck, lambda images: adaptive_avg_pool2d(images, (3, 4)), images)
    assert good and calls


@pytest.mark.parametrize("name", ["alexnet", "googlenet"])
def test_networks_that_torch_refuses_get_the_replaced_gradient(replaced, name):
    """AlexNet by its module, GoogLeNet's auxiliary heads by the function."""
    model = build_model(ModelConfig(name=name), 3).train()

    def backward():
        output = model(torch.randn(2, 3, 224, 224))
        sum(part.sum() for part in (output if isinstance(output, tuple) else [output])).backward()

    assert replaced(backward)[1] > 0
