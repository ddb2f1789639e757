"""A model of scaling: one GPU's step time, the gradient's bytes and the links -> efficiency on many GPUs. A prediction.

Each GPU keeps its local batch, so the global batch grows with their number. A step takes the time that one GPU needs
alone, and

- the part of the gradient's all-reduce that does not hide behind the backward pass. It goes in two levels, as in NCCL:
  within a node 2 (g - 1) / g of the bytes over each GPU's own link, among m nodes 2 (m - 1) / m of them over the node's
  link; each of k buckets also pays the latency 2 log2(n) times. The backward pass is two thirds of a step, and the last
  bucket has nothing left to hide behind;
- the wait for the slowest of n ranks: if their times spread normally by a share s, the slowest is later than the mean
  by s sqrt(2 ln n).

What the ranks of a node share (cores that decode, power, a file system) is in no term. The spread of 5 % is fitted to
the two published results that `PUBLISHED` holds: without it the model is too optimistic by 16 and 6 percentage
points, with it by 6 and 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.command import parse_numbers
from pipeline.counts import count
from pipeline.errors import UserError

BACKWARD = 2 / 3  # of a step's time: twice the forward's arithmetic
SPREAD = 0.05
EPOCHS = 90


@dataclass(frozen=True)
class Links:
    """gpus_per_node: GPUs that share a node's link. inside_gb_s: of each GPU to the others of its node, 1e9 bytes a
    second. outside_gb_s: of a node to others, all its cards together. latency_us: of one hop, microseconds."""

    gpus_per_node: int = 8
    inside_gb_s: float = 200.0
    outside_gb_s: float = 50.0
    latency_us: float = 15.0


@dataclass(frozen=True)
class Predicted:
    """gpus. step_s: of a step. exchange_s: the all-reduce alone; exposed_s: its part that nothing hides. straggling_s:
    the wait for the slowest. efficiency: of one GPU's speed, 0 to 1."""

    gpus: int
    step_s: float
    exchange_s: float
    exposed_s: float
    straggling_s: float
    efficiency: float


def exchange_s(gpus: int, gradient_bytes: float, links: Links, buckets: int = 1) -> float:
    """Seconds of an all-reduce of `gradient_bytes` in `buckets` parts."""
    if gpus == 1:
        return 0.0
    inside = min(gpus, links.gpus_per_node)
    nodes = math.ceil(gpus / links.gpus_per_node)
    seconds = 2 * (inside - 1) / inside * gradient_bytes / (links.inside_gb_s * 1e9)
    seconds += 2 * (nodes - 1) / nodes * gradient_bytes / (links.outside_gb_s * 1e9)
    return seconds + buckets * 2 * math.ceil(math.log2(gpus)) * links.latency_us * 1e-6


def predict(
    gpus: int,
    alone_s: float,
    gradient_bytes: float,
    links: Links,
    bucket_bytes: float = 25 * 2**20,
    spread: float = SPREAD,
) -> Predicted:
    """A step on `gpus` GPUs, from `alone_s`, a step of one GPU that has nobody to wait for."""
    buckets = max(1, math.ceil(gradient_bytes / bucket_bytes))
    exchange = exchange_s(gpus, gradient_bytes, links, buckets)
    last = exchange / buckets
    exposed = last + max(0.0, exchange - last - BACKWARD * alone_s)
    straggling = spread * math.sqrt(2 * math.log(gpus)) * alone_s
    step = alone_s + exposed + straggling
    return Predicted(gpus, step, exchange, exposed, straggling, alone_s / step)


@dataclass(frozen=True)
class PublishedScaling:
    """images_per_s: of `few` and of `many` GPUs, or their ratio as `efficiency`, of the same local batch."""

    name: str
    few: int
    many: int
    alone_s: float
    gradient_bytes: float
    links: Links
    efficiency: float

    def predicted(self) -> float:
        """Of the efficiency from `few` to `many` GPUs."""
        at = [predict(n, self.alone_s, self.gradient_bytes, self.links).efficiency for n in (self.few, self.many)]
        return at[1] / at[0]


RESNET50_BYTES = 4 * 25_557_032
PUBLISHED = (
    # NVIDIA DeepLearningExamples, ResNet-50 v1.5, AMP, A100-80GB, 256 images a GPU: 2,470 and 16,621 images/s
    PublishedScaling("NVIDIA DLE, 1 -> 8 A100", 1, 8, 256 / 2470, RESNET50_BYTES, Links(8, 200, 50), 16621 / 8 / 2470),
    # Goyal et al. 2017, ResNet-50, 8 P100 a server, 50 Gbit/s Ethernet, 32 images a GPU; about a quarter second a step
    PublishedScaling("Goyal et al., 8 -> 256 P100", 8, 256, 0.22, RESNET50_BYTES, Links(8, 20, 6.25, 50), 0.90),
)


def parse_scale(text: str) -> list[int]:
    """'1..1024' -> powers of two from 1 to 1024; '1,6,12' -> these. Raises UserError."""
    example = "1..1024 or 1,8,64"
    if ".." not in text:
        return parse_numbers("--scale", text, example)
    ends = parse_numbers("--scale", text, example, separator="..")
    if len(ends) != 2 or ends[0] > ends[1]:
        raise UserError(f"--scale {text}: give the first and the last number of GPUs, e.g. 1..1024")
    return [ends[0] << n for n in range((ends[1] // ends[0]).bit_length())]


def scaling_facts(
    sizes: Sequence[int],
    alone_s: float,
    origin: str,
    local_batch: int,
    gradient_bytes: float,
    links: Links,
    images: int,
    bucket_bytes: float,
) -> dict:
    """The predictions as plain values; times in seconds."""
    rows = []
    for gpus in sizes:
        p = predict(gpus, alone_s, gradient_bytes, links, bucket_bytes)
        rate = gpus * local_batch / p.step_s
        rows.append(
            {
                "gpus": gpus,
                "global_batch_size": gpus * local_batch,
                "images_per_s": rate,
                "efficiency": p.efficiency,
                "step_s": p.step_s,
                "exchange_s": p.exchange_s,
                "exposed_s": p.exposed_s,
                "straggling_s": p.straggling_s,
                "run_s": images * EPOCHS / rate,
            }
        )
    checked = [{"name": p.name, "published": p.efficiency, "predicted": p.predicted()} for p in PUBLISHED]
    return {
        "rows": rows,
        "alone_s": alone_s,
        "alone_from": origin,
        "gradient_bytes": gradient_bytes,
        "links": vars(links),
        "epochs": EPOCHS,
        "checked_against": checked,
    }


def scaling_lines(facts: dict) -> list[str]:
    """The predictions as a table."""
    from pipeline.progress import duration

    links = facts["links"]
    first = facts["rows"][0]
    lines = [
        f"Predicted, not measured: scaling with {count(first['global_batch_size'] // first['gpus'], 'image')} a GPU, "
        f"from a step of {1e3 * facts['alone_s']:.1f} ms on one ({facts['alone_from']})",
        f"  {facts['gradient_bytes'] / 1e6:,.1f} MB of gradient; {count(links['gpus_per_node'], 'GPU')} a node, "
        f"{links['inside_gb_s']:g} GB/s inside, {links['outside_gb_s']:g} GB/s from node to node, "
        f"{links['latency_us']:g} us a hop",
        f"  {'GPUs':>5} {'global batch':>13} {'images/s':>12} {'efficiency':>11} {'exchange':>10} {'exposed':>9} "
        f"{facts['epochs']:g} epochs",
    ]
    for row in facts["rows"]:
        lines.append(
            f"  {row['gpus']:>5,} {row['global_batch_size']:>13,} {row['images_per_s']:>12,.0f} "
            f"{100 * row['efficiency']:>10.1f}% {1e3 * row['exchange_s']:>7.1f} ms {1e3 * row['exposed_s']:>6.1f} ms "
            f"{duration(row['run_s'])}"
        )
    for check in facts["checked_against"]:
        lines.append(
            f"  the same model for {check['name']}: {100 * check['predicted']:.0f} %, published "
            f"{100 * check['published']:.0f} %"
        )
    return lines
