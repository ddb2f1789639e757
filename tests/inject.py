"""`pipeline train` with a fault in one rank: `python -m tests.inject FAULT RANK STEP train --config ...`.

Everything else is the real thing; only the fault is made.
"""

import os
import sys
import time
from pathlib import Path

import torch

from pipeline.__main__ import main
from pipeline.training import evaluate as evaluation
from pipeline.training.step import TrainStep


def spoil_gradient(train_step: TrainStep) -> None:
    """The next backward gives one gradient of this rank a NaN, before the ranks average theirs."""
    parameter = next(train_step.model.parameters())

    def spoil(gradient):
        handle.remove()
        return gradient * torch.nan

    handle = parameter.register_hook(spoil)


def flip_bit(train_step: TrainStep) -> None:
    """One bit of one weight turns over, as in a faulty memory."""
    weight = dict(train_step.model.named_parameters())["layer1.0.conv1.weight"]
    weight.data[0, 0, 0, :1].view(torch.int32).bitwise_xor_(1 << 20)


def slow_down(train_step: TrainStep) -> None:
    """From now on each forward of this rank takes a twentieth of a second more."""
    real = train_step.forward

    def forward(*arguments):
        time.sleep(0.05)
        return real(*arguments)

    train_step.forward = forward


def hold_evaluation() -> None:
    """Each evaluation begins with the file `evaluating` in the folder that $HOLD names, and waits until it is gone."""
    real, path = evaluation.evaluate, Path(os.environ["HOLD"]) / "evaluating"

    def evaluate(*arguments):
        if os.environ.get("RANK", "0") == "0":
            path.touch()
        while path.exists():
            time.sleep(0.01)  # polls a condition
        return real(*arguments)

    evaluation.evaluate = evaluate


def wait_from(rank: int, first: int) -> None:
    """Step number `first` (from 0, of the whole run) and later ones of a rank never begin: time to kill it before."""
    real = TrainStep.__call__

    def call(self, batch, lr, step=0):
        while step >= first and int(os.environ.get("RANK", 0)) == rank:
            time.sleep(0.1)  # nothing ends it: the test kills this process
        return real(self, batch, lr, step)

    TrainStep.__call__ = call


def break_gpu(_: TrainStep) -> None:
    """What torch says of a GPU whose memory fails, if this node is $BAD_NODE, or on any."""
    if os.environ.get("BAD_NODE") in (None, os.environ.get("SLURMD_NODENAME")):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


FAULTS = {"gpu": break_gpu, "nan": spoil_gradient, "flip": flip_bit, "die": lambda _: os._exit(9), "slow": slow_down}


def inject(fault: str, rank: int, step: int) -> None:
    """Let the fault happen before the training step `step` (from 0) of a start, on one rank."""
    real, steps = TrainStep.__call__, iter(range(10**9))

    def call(self, *arguments):
        if next(steps) == step and int(os.environ.get("RANK", 0)) == rank:
            FAULTS[fault](self)
        return real(self, *arguments)

    TrainStep.__call__ = call


if __name__ == "__main__":
    fault, rank = sys.argv[1], int(sys.argv[2])
    if fault == "hold":
        hold_evaluation()
    elif fault == "wait":
        wait_from(rank, int(sys.argv[3]))
    elif fault != "differ":
        inject(fault, rank, int(sys.argv[3]))
    other = ["--optim.lr", "0.3"] if fault == "differ" and int(os.environ["RANK"]) == rank else []
    sys.exit(main([*sys.argv[4:], *other]))
