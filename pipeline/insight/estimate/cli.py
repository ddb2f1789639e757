"""The verb `estimate`: a run's parameters, arithmetic, memory and time, before any GPU is touched."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command import parse_numbers, split_options
from pipeline.config import Config, parse_config
from pipeline.counts import count
from pipeline.dataset.imagenet import CLASSES, TRAIN_IMAGES
from pipeline.dataset.index.index import locate_index, open_index
from pipeline.errors import EXIT_OK, UserError
from pipeline.insight.estimate.gpus import Card, find_card
from pipeline.insight.status.run_state import median_step_s, read_tail
from pipeline.progress import duration
from pipeline.run_paths import RunPaths
from pipeline.tracking.ledger_rows import is_start, read_rows

if TYPE_CHECKING:
    from pipeline.insight.estimate.trace import Trace

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Options:
    """Estimate a run's parameters, FLOPs, memory and time, before any GPU is used. Takes the options of `pipeline
    train`; classes and images are those of --data.root if it is given, otherwise ImageNet's."""

    card: str | None = None
    """A GPU by name (a6000, h100, ...): its largest batch, and the shortest time of an epoch by its roofline."""
    card_mib: float | None = None
    """Memory of the GPU in MiB, where it differs from the card's."""
    batches: str = ",".join(map(str, BATCHES))
    """Numbers of images at once to tabulate, separated by commas."""
    layers: bool = False
    """Print one row for each layer: parameters, output, FLOPs, bytes kept for backward."""
    world_size: int | None = None
    """Number of GPUs that share the global batch; default: the run's (with --run), or 1."""
    run: str | None = None
    """Run folder: the time of an epoch follows from the run's last steps, and the recipe from its config.yaml unless
    --config is given."""
    images_per_s: float | None = None
    """Speed of all GPUs together, for the time of an epoch."""
    conv_bias: bool = False
    """Give every convolution a bias."""
    scale: str | None = None
    """Predict speed and time on these numbers of GPUs (1..1024 or 1,8,64) from the time of a step (--run,
    --images_per_s or --card)."""
    node_gpus: int = 8
    """For --scale: GPUs in a node."""
    inside_gb_s: float = 200.0
    """For --scale: bandwidth between the GPUs of a node in GB/s."""
    outside_gb_s: float = 50.0
    """For --scale: bandwidth from a node to the others in GB/s."""
    latency_us: float = 15.0
    """For --scale: latency of a hop in microseconds."""
    json: bool = False
    """Print one JSON object instead."""


def data_set(config: Config) -> tuple[int, int]:
    """(training images, classes): of the index at data.root, or ImageNet's."""
    if not config.data.root:
        return TRAIN_IMAGES, CLASSES
    index = open_index(locate_index(config.data))
    return len(index.splits["train"]), index.num_classes


def measured_rate(options: Options) -> tuple[float, str, int] | None:
    """(images/s of all GPUs, where it comes from, of how many), or None where nothing was measured."""
    if options.images_per_s is not None:
        if not options.images_per_s > 0:
            raise UserError(f"--images_per_s {options.images_per_s}: give a number above 0")
        return options.images_per_s, "as given", options.world_size or 1
    if options.run is None:
        return None
    ledger = RunPaths(Path(options.run).expanduser()).ledger
    if not ledger.exists():
        raise UserError(f"--run {options.run} has no metrics.jsonl; give the folder of a run")
    step_s = median_step_s(read_tail(ledger), 1)  # of one image
    if step_s is None:
        raise UserError(f"--run {options.run} has no training step yet; give another run")
    starts = (row for row in read_rows(ledger) if is_start(row))
    world_size = max(starts, key=lambda row: row.get("time", 0), default={}).get("world_size", 1)
    return 1 / step_s, f"measured by {options.run}", world_size


def estimate(config: Config, options: Options) -> dict:
    """The results as plain values. Bytes are in MiB, times in seconds, FLOPs of one image."""
    from pipeline.insight.estimate.memory import MIB, checkpoint_bytes, run_memory, step_memory, weight_bytes
    from pipeline.insight.estimate.trace import Tracer, by_kind
    from pipeline.model.sizes import check_image_sizes

    batches = parse_numbers("--batches", options.batches, "36,48,64")
    images, classes = data_set(config)
    classes = config.model.num_classes or classes
    card = find_card(options.card) if options.card else None
    card_mib = options.card_mib or (card.memory_mib if card else None)
    rate = measured_rate(options)
    world_size = options.world_size if options.world_size is not None else rate[2] if rate else 1
    if world_size < 1 or config.train.global_batch_size % world_size:
        raise UserError(f"--world_size {world_size} does not divide the global batch; give a divisor")
    if rate and rate[2] != world_size:
        raise UserError(
            f"--world_size {world_size}: {options.run} was measured on {rate[2]}; leave it out, or see --scale"
        )
    local = config.train.local_batch_size(world_size)
    at_once = config.train.local_micro_batch_size(world_size)
    check_image_sizes(config)
    tracer = Tracer(config, classes, options.conv_bias)
    memory = step_memory(tracer, at_once)
    run = run_memory(memory, config, world_size)
    step = tracer.trace(at_once)
    trained = sum(p.numel() for p in tracer.model.parameters() if p.requires_grad)
    facts = {
        "model": config.model.name,
        "classes": classes,
        "image_size": config.data.image_size,
        "precision": config.train.precision,
        "channels_last": config.train.channels_last,
        "parameters": sum(p.numel() for p in tracer.model.parameters()),
        "trained_parameters": trained,
        "forward_flops": step.forward_flops // at_once,
        "training_flops": step.flops // at_once,
        "averaged": config.ema.averages,
        "weights_mib": memory.weights_mib,
        "gradients_mib": memory.gradients_mib,
        "optimizer": config.optim.name,
        "optimizer_mib": memory.optimizer_mib,
        "kept_mib": memory.kept_mib,
        "image_mib": memory.image_mib,
        "transient_mib": memory.transient_mib,
        "images_at_once": at_once,
        "local_batch": local,
        "beside_mib": run.by_name(at_once),
        "card_mib_by_batch": {n: memory.card_mib(n) for n in batches},
        "weights_file_mib": weight_bytes(tracer.model) / MIB,
        "checkpoint_mib": checkpoint_bytes(tracer.model, config) / MIB,
        "training_images": images,
        "world_size": world_size,
    }
    if card_mib is not None:
        facts |= {"card": options.card, "card_mib": card_mib, "largest_batch": run.most_images(card_mib)}
        facts["largest_batch_of_step"] = memory.most_images(card_mib)
    if rate is not None:
        facts |= {"images_per_s": rate[0], "images_per_s_from": rate[1], "epoch_s": images / rate[0]}
    if card is not None:
        facts["roofline_epoch_s"] = roofline_epoch_s(step, card, images, world_size)
    if options.scale:
        facts["scaling"] = scale(
            config,
            options,
            facts,
            step.seconds(card.half_tflops, card.tflops, card.gb_s) * local / at_once if card else None,
        )
    if options.layers:
        rows = [layer for layer in step.layers.values() if layer.parameters or layer.flops or layer.kept]
        facts["layers"] = [
            {
                "name": layer.name,
                "kind": layer.kind,
                "output": list(layer.shape),
                "parameters": layer.parameters,
                "forward_flops": layer.flops // at_once,
                "kept_mib": layer.kept / at_once / MIB,
            }
            for layer in rows
        ]
        facts["kinds"] = [
            [kind, number, parameters, flops // at_once, kept / at_once / MIB]
            for kind, number, parameters, flops, kept in by_kind(step.layers)
        ]
    return facts


def scale(config: Config, options: Options, facts: dict, roofline_s: float | None) -> dict:
    """The prediction of `scaling`. roofline_s: a step of one GPU by its roofline, if nothing is measured.

    Raises UserError where the time of a step is unknown.
    """
    from pipeline.insight.estimate.scaling import Links, parse_scale, scaling_facts

    sizes = parse_scale(options.scale or "")
    if min(options.node_gpus, options.inside_gb_s, options.outside_gb_s) <= 0 or options.latency_us < 0:
        raise UserError("--node_gpus, --inside_gb_s and --outside_gb_s must be above 0, --latency_us 0 or more")
    if "images_per_s" in facts:
        alone_s = config.train.global_batch_size / facts["images_per_s"]
        origin = f"{facts['images_per_s_from']}, {count(facts['world_size'], 'process')}"
    elif roofline_s is not None:
        alone_s, origin = roofline_s, f"the roofline of {options.card}, which no kernel reaches"
    else:
        raise UserError("--scale needs the time of a step; give --run, --images_per_s or --card")
    return scaling_facts(
        sizes,
        alone_s,
        origin,
        facts["local_batch"],
        facts["trained_parameters"] * (2 if config.train.compress_gradients else 4),
        Links(options.node_gpus, options.inside_gb_s, options.outside_gb_s, options.latency_us),
        facts["training_images"],
        config.train.bucket_mb * 2**20,
    )


def roofline_epoch_s(step: "Trace", card: Card, images: int, world_size: int) -> float:
    """The shortest an epoch can take: every kernel at the card's peak, no wait for data or for other ranks."""
    return step.seconds(card.half_tflops, card.tflops, card.gb_s) / step.images * images / world_size


def _flops(value: float) -> str:
    return f"{value / 1e9:,.2f} G"


def render(facts: dict) -> str:
    """The results as text."""
    from pipeline.insight.estimate.memory import CONTEXT_MIB, RESERVE, SLACK, STATE_COPY

    layout = ", channels_last" if facts["channels_last"] else ""
    frozen = facts["parameters"] - facts["trained_parameters"]
    lines = [
        f"{facts['model']} for {count(facts['classes'], 'class')}, {facts['image_size']} px, "
        f"{facts['precision']}{layout}",
        "",
        f"  parameters    {facts['parameters']:,}" + (f", {frozen:,} of them frozen" if frozen else ""),
        f"  FLOPs         {_flops(facts['forward_flops'])} an image forward, {_flops(facts['training_flops'])} in "
        "training (a multiply and an add are two)",
        f"  weights file  {facts['weights_file_mib']:,.1f} MiB; checkpoint with optimizer "
        f"{facts['checkpoint_mib']:,.1f} MiB",
        "",
        "GPU memory, MiB",
        f"  {facts['weights_mib']:10,.2f}  weights and buffers{', and their average' if facts['averaged'] else ''}",
        f"  {facts['gradients_mib']:10,.2f}  gradients",
        f"  {facts['optimizer_mib']:10,.2f}  optimizer ({facts['optimizer']})",
        f"  {facts['kept_mib']:10,.2f}  kept for backward, whatever the batch",
        f"  {facts['image_mib']:10,.2f}  kept for backward, each image",
        f"  {facts['transient_mib']:10,.2f}  transient, each image",
        f"  {CONTEXT_MIB:10,.2f}  CUDA context and workspaces, and {SLACK:.0%} on all above for the allocator (fitted)",
        *(
            f"  {mib:10,.2f}  {name}" + ("" if name == STATE_COPY else " (assumed, not measured)")
            for name, mib in facts["beside_mib"].items()
        ),
        "",
        "the step alone",
        "  images at once  " + " ".join(f"{n:>8,}" for n in facts["card_mib_by_batch"]),
        "  GPU MiB         " + " ".join(f"{mib:8,.0f}" for mib in facts["card_mib_by_batch"].values()),
    ]
    if "card_mib" in facts:
        name = facts["card"] or "the card"
        lines += [
            "",
            f"  at most {count(facts['largest_batch'], 'image')} at once on {name} ({facts['card_mib']:,.0f} MiB), "
            f"with all of the above and {RESERVE:.0%} left free; {facts['largest_batch_of_step']:,} fit the step alone",
        ]
    lines += [""] if "epoch_s" in facts or "roofline_epoch_s" in facts else []
    many = count(facts["training_images"], "image")
    if "epoch_s" in facts:
        speed = f"{facts['images_per_s']:,.0f} images/s ({facts['images_per_s_from']})"
        lines.append(f"An epoch of {many} takes {duration(facts['epoch_s'])} at {speed}")
    if "roofline_epoch_s" in facts:
        cards = f"{facts['world_size']} x {facts['card']}"
        lines.append(
            f"An epoch of {many} takes at least {duration(facts['roofline_epoch_s'])} on {cards}, "
            f"{count(facts['images_at_once'], 'image')} at once (roofline: a bound, not a forecast)"
        )
    if "scaling" in facts:
        from pipeline.insight.estimate.scaling import scaling_lines

        lines += ["", *scaling_lines(facts["scaling"])]
    if "layers" in facts:
        lines += ["", *_layer_lines(facts)]
    return "\n".join(lines)


def _layer_lines(facts: dict) -> list[str]:
    width = max(24, *(len(layer["name"]) for layer in facts["layers"]))
    head = f"{'parameters':>12}  {'GFLOPs':>8}  {'MiB kept':>8}"
    wide = max(18, *(len(layer["kind"]) for layer in facts["layers"]))
    lines = [f"{'layer':<{width}}  {'kind':<{wide}}  {'output':<16}  {head}"]
    for layer in facts["layers"]:
        shape = "x".join(map(str, layer["output"]))
        numbers = f"{layer['parameters']:12,}  {layer['forward_flops'] / 1e9:8.3f}  {layer['kept_mib']:8.3f}"
        lines.append(f"{layer['name'] or '(model)':<{width}}  {layer['kind']:<{wide}}  {shape:<16}  {numbers}")
    lines += ["", f"{'of each kind':<{width}}  {'':<{wide}}  {'modules':<16}  {head}"]
    for kind, number, parameters, flops, kept in facts["kinds"]:
        lines.append(f"{'':<{width}}  {kind:<{wide}}  {number:<16}  {parameters:12,}  {flops / 1e9:8.3f}  {kept:8.3f}")
    return lines


def main(argv: list[str]) -> int:
    options, rest = split_options(Options, "estimate", argv)
    recipe_given = any(item.partition("=")[0] == "--config" for item in rest)
    if options.run and not recipe_given and RunPaths(Path(options.run).expanduser()).config.exists():
        rest = ["--config", str(RunPaths(Path(options.run).expanduser()).config), *rest]
    facts = estimate(parse_config(rest, "estimate", Options), options)
    print(json.dumps(facts) if options.json else render(facts), flush=True)
    return EXIT_OK
