"""A loss or an optimizer of the user's own, `MODULE:NAME`: made, and tried on a few numbers before a run starts."""

import copy
import inspect
import io
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.config import Config, OptimConfig
from pipeline.config.networks import is_own, load_function
from pipeline.errors import UserError

_IMAGES, _STEPS = 4, 2


def _said(error: Exception) -> str:
    """What an error says, in a line, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{str(error).splitlines()[0] if str(error) else repr(error)} ({last.filename}:{last.lineno})"


# --- the loss


def load_loss(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function that takes (logits, targets); a class is called without arguments and gives it. Raises UserError."""
    found: Any = load_function(name, "--optim.loss")
    if inspect.isclass(found):
        try:
            found = found()
        except Exception as error:
            raise UserError(f"--optim.loss {name} can't be made without arguments: {_said(error)}") from error
    if isinstance(found, nn.Module) and any(True for _ in found.parameters()):
        raise UserError(
            f"--optim.loss {name} has parameters of its own, which nothing trains or saves; put them into the network"
        )
    return found


def check_loss(config: Config, classes: int | None) -> None:
    """Raises UserError unless an own loss gives the mean over the batch, as a number that has a gradient.

    classes: outputs of the network, which a loss may be made for (a weight for each class); None: not known yet, so
    that the loss is only found and made.
    """
    name = config.optim.loss
    if not is_own(name):
        return
    loss = load_loss(name)
    if classes is None:
        return
    with torch.random.fork_rng(devices=[]):
        logits = torch.randn(_IMAGES, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
        targets = torch.arange(_IMAGES) % classes
        kinds = {f"labels int64 [{_IMAGES}]": targets}
        if config.augment.mixes:
            kinds[f"soft targets float [{_IMAGES}, {classes}]"] = nn.functional.one_hot(targets, classes).float()
        for kind, given in kinds.items():
            needs = f"--optim.loss {name} is called with logits float [{_IMAGES}, {classes}] and {kind}"
            try:
                value = loss(logits, given)
                twice = loss(torch.cat([logits, logits]), torch.cat([given, given]))
            except Exception as error:
                raise UserError(f"{needs}, and fails: {_said(error)}") from error
            if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
                got = f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise UserError(f"{needs}, and returns {got}; it must return one number, the mean over the batch")
            if not value.requires_grad:
                raise UserError(f"{needs}, and what it returns has no gradient; compute it from the logits alone")
            if value.item() and abs(twice.item() / value.item() - 2) < 1e-4:
                raise UserError(f"{needs}, and returns a sum; it must return the mean over the batch")


# --- the optimizer


def make_own_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` names, over these parameter groups. Raises UserError where it can't be made."""
    name, kwargs = config.name, config.kwargs
    make = load_function(name, "--optim.name")
    try:
        optimizer = make(groups, lr=config.lr, **kwargs)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in {"lr": config.lr, **kwargs}.items())
        raise UserError(
            f"--optim.name {name} can't be made of parameter groups and {given}: {_said(error)}; it must take them, "
            "and what --optim.kwargs has"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise UserError(f"--optim.name {name} gives {kind}; it must be or return a torch.optim.Optimizer")
    if len(optimizer.param_groups) != len(groups) or any("lr_factor" not in g for g in optimizer.param_groups):
        raise UserError(f"--optim.name {name} makes parameter groups of its own; it must keep those that it is given")
    if any("lr" not in group for group in optimizer.param_groups):
        raise UserError(f"--optim.name {name} has no group option 'lr'; the schedule sets it at every step")
    if "weight_decay" not in optimizer.defaults and any(group["weight_decay"] for group in groups):
        raise UserError(
            f"--optim.name {name} has no group option 'weight_decay', so nothing would decay; give "
            "--optim.weight_decay 0 (and norm_weight_decay, bias_weight_decay 0)"
        )
    return optimizer


def check_optimizer(config: OptimConfig) -> None:
    """Raises UserError unless an own optimizer changes weights, and is after a save and a load what it was before."""
    if not is_own(config.name):
        return
    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    groups = [{"params": list(network.parameters()), "weight_decay": config.weight_decay, "lr_factor": 1.0}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in network.parameters():
            nn.init.normal_(p)
        before = [p.detach().clone() for p in network.parameters()]
        optimizer = make_own_optimizer(groups, config)
        for step in range(_STEPS):
            _take_step(network, optimizer, config.name, step)
        if all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)):
            raise UserError(f"--optim.name {config.name} changes no weight in {_STEPS} steps with lr {config.lr}")
        again = copy.deepcopy(network)
        resumed = make_own_optimizer([groups[0] | {"params": list(again.parameters())}], config)
        try:
            resumed.load_state_dict(_as_saved(optimizer.state_dict()))
        except Exception as error:
            raise UserError(
                f"--optim.name {config.name}: its state_dict() can't be saved and loaded: {_said(error)}; it must hold "
                "tensors, numbers and text"
            ) from error
        for one, other in ((network, optimizer), (again, resumed)):
            _take_step(one, other, config.name, _STEPS)
        if any(not torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True)):
            raise UserError(
                f"--optim.name {config.name}: after a save and a load its next step is another one, so a resumed run "
                "would differ; all that it remembers must be in state_dict()"
            )


def _take_step(network: nn.Module, optimizer: torch.optim.Optimizer, name: str, step: int) -> None:
    torch.manual_seed(step)
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    try:
        optimizer.step()
    except Exception as error:
        raise UserError(f"--optim.name {name}: step() without a closure fails: {_said(error)}") from error


def _as_saved(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
