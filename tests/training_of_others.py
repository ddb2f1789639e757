"""Losses and optimizers of one's own for tests, as a user would bring them: good ones, and one for each mistake."""

import torch
from torch import nn
from torch.nn import functional

from pipeline.rng import hash_counter


def cross_entropy(logits, targets):
    return functional.cross_entropy(logits, targets)


class Focal(nn.Module):
    """Made without arguments; soft targets too."""

    def forward(self, logits, targets):
        return (1 - cross_entropy(logits, targets).neg().exp()) ** 2 * cross_entropy(logits, targets)


def nan_at_step_two(logits, targets):
    bad = torch.initial_seed() == int(hash_counter(0, 0x5EED, 2, 0)) >> 1
    return cross_entropy(logits, targets) * (float("nan") if bad else 1)


def reads_values(logits, targets):
    return cross_entropy(logits, targets) * (2 if logits.max().item() > 0 else 1)


def summed(logits, targets):
    return functional.cross_entropy(logits, targets, reduction="sum")


def weighted(logits, targets):
    return functional.cross_entropy(logits, targets, weight=torch.tensor([1.0, 2.0, 1.0, 3.0]))


def each(logits, targets):
    return functional.cross_entropy(logits, targets, reduction="none")


def number(logits, targets):
    return cross_entropy(logits, targets).item()


def constant(logits, targets):
    return torch.ones(())


def labels_alone(logits, targets):
    return -logits.log_softmax(1).gather(1, targets[:, None]).mean()


def one_argument(logits):
    return logits.mean()


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, logits, targets):
        return self.weight * cross_entropy(logits, targets)


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023 (arXiv 2302.06675), algorithm 2."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            one, two = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = (one * momentum + (1 - one) * p.grad).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                momentum.mul_(two).add_(p.grad, alpha=1 - two)


class Forgetful(Lion):
    """Keeps its momentum where no state_dict finds it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = {}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.kept[p] = self.kept.get(p, 0) * 0.9 + p.grad
                p.sub_(group["lr"] * self.kept[p])


class NeedsClosure(Lion):
    def step(self, closure):
        closure()


class Idle(Lion):
    def step(self, closure=None):
        pass


def regrouped(groups, lr):
    return torch.optim.SGD([p for group in groups for p in group["params"]], lr=lr)


def no_optimizer(groups, lr):
    return "sgd"


def no_rate(groups):
    return torch.optim.SGD(groups, lr=0.1)
