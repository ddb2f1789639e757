"""What augmentation costs: drawing it, and making it on a CPU, against torchvision's v2 transforms image by image.

    python benchmarks/augment.py [--batch 64] [--size 224] [--rounds 9] > benchmarks/augment.json

Both sides take turns, round by round, on one thread; medians are given, and the median of the rounds' ratios.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from pipeline.augment.apply import EraseAndMix, PixelOps
from pipeline.augment.mixing import apply_erase_mix, soft_targets
from pipeline.augment.ops import apply_ops
from pipeline.config import AugmentConfig
from pipeline.loader.plan import TrainPlan
from pipeline.model.build import Normalized

CPU, CLASSES = torch.device("cpu"), 1000
BILINEAR = {"interpolation": "bilinear"}
POLICIES = {
    "randaugment": (AugmentConfig(policy="randaugment", **BILINEAR), v2.RandAugment(**BILINEAR)),
    "randaugment-timm m7 std 0.5": (
        AugmentConfig(policy="randaugment-timm", magnitude=7, magnitude_std=0.5, **BILINEAR),
        None,
    ),
    "trivialaugment": (AugmentConfig(policy="trivialaugment", **BILINEAR), v2.TrivialAugmentWide(**BILINEAR)),
    "autoaugment": (AugmentConfig(policy="autoaugment", **BILINEAR), v2.AutoAugment(**BILINEAR)),
    "jitter": (AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1)), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)),
}
MIXED = AugmentConfig(random_erase=0.1, mixup=0.2, cutmix=1.0)
EVERYTHING = AugmentConfig(
    policy="randaugment-timm",
    magnitude_std=0.5,
    jitter=(0.4,) * 3 + (0.1,),
    random_erase=0.1,
    repeats=3,
    mixup=0.2,
    cutmix=1,
)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours: Callable, theirs: Callable | None, rounds: int, each: int) -> dict[str, float]:
    """Seconds for `each` images of both by turns, as milliseconds an image, and how many times ours is faster."""
    ours(), theirs and theirs()
    times = [(seconds(ours), seconds(theirs) if theirs else 0.0) for _ in range(rounds)]
    found = {"ours_ms": round(1e3 * statistics.median(a for a, _ in times) / each, 4)}
    if theirs:
        found["torchvision_ms"] = round(1e3 * statistics.median(b for _, b in times) / each, 4)
        found["times_faster"] = round(statistics.median(b / a for a, b in times), 2)
    return found


def photo_like(count: int, size: int) -> torch.Tensor:
    """uint8 [count, size, size, 3]: smooth with some noise, so that no op has an easy case."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, size // 16, size // 16, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    noisy = 255 * smooth + 6 * torch.randn(smooth.shape, generator=generator)
    return noisy.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def make_plan(c: AugmentConfig | None, batch: int, size: int) -> TrainPlan:
    samples = np.full(100_000, 500)
    more = {} if c is None else {"augment": c}
    return TrainPlan(samples, samples - 125, batch, 1, size_at=lambda epoch: size, **more)


def measure(batch: int, size: int, rounds: int) -> dict:
    result = {"made_by": f"benchmarks/augment.py --batch {batch} --size {size} --rounds {rounds}"}
    result["machine"] = {"processor": platform.processor() or platform.machine(), "threads": 1}
    result["torch"] = torch.__version__
    plans = {"windows and flips alone": None, "everything on": EVERYTHING}
    plans |= {name: c for name, (c, _) in POLICIES.items()} | {"erasing, mixup and CutMix": MIXED}
    made = {name: make_plan(c, 1024, size) for name, c in plans.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for step in range(rounds + 1):
        for name, plan in made.items():
            times[name].append(seconds(lambda plan=plan, step=step: plan.local(step)))
    result["plan_us_per_sample"] = {
        name: round(1e6 * statistics.median(values[1:]) / 1024, 2) for name, values in times.items()
    }
    images = photo_like(batch, size)
    planes = [image.permute(2, 0, 1).contiguous() for image in images]
    result["policy_ms_per_image"] = {}
    for name, (c, transform) in POLICIES.items():
        step = iter(range(10_000))
        plan = make_plan(c, batch, size)

        def ours(plan=plan, c=c, step=step):
            pixel_ops = PixelOps.of(plan.local(next(step)).augment_params, size, CPU)
            return apply_ops(images, pixel_ops, c.interpolation, c.fill)

        def theirs(transform=transform):
            return [transform(plane) for plane in planes]

        result["policy_ms_per_image"][name] = compare(ours, theirs if transform else None, rounds, batch)
    plan = make_plan(MIXED, batch, size)
    normalize = Normalized(nn.Identity(), (0.5,) * 3, (0.2,) * 3, channels_last=True).normalize
    labels, step = torch.arange(batch), iter(range(10_000))
    erase, mix = v2.RandomErasing(0.1), [v2.MixUp(alpha=0.2, num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)]

    def retouched():
        planned = plan.local(next(step))
        how = EraseAndMix.of(planned.augment_params, planned.mixing, CPU)
        return apply_erase_mix(normalize(images), how, 2), soft_targets(labels, how.shares, 2, CLASSES)

    def torchvisions():
        pixels = torch.stack([erase(image) for image in normalize(images)])
        return mix[int(torch.rand(()) < 0.5)](pixels, labels)

    result["erasing_and_mixing_ms_per_image"] = compare(retouched, torchvisions, rounds, batch)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(measure(arguments.batch, arguments.size, arguments.rounds), indent=1))
