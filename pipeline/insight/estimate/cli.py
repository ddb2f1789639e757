"""The verb `estimate`: a run's parameters, arithmetic, memory and time, before any GPU is touched."""

import argparse
import json
from pathlib import Path

from pipeline.config import Config, parse_config
from pipeline.dataset.imagenet import CLASSES, TRAIN_IMAGES
from pipeline.dataset.index.index import index_folder, open_index
from pipeline.errors import EXIT_OK, UserError
from pipeline.insight.estimate.gpus import Card, find_card
from pipeline.insight.status.cli import duration
from pipeline.insight.status.run_state import median_step_s, read_tail
from pipeline.tracking.ledger import read_rows

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ABOUT = """usage: pipeline estimate --config NAME_OR_FILE [options of train] [these]

Parameters, FLOPs, memory and time of a run's network, before any GPU is touched. Takes what `pipeline train` takes;
with --data.root, classes and images are the data set's, otherwise ImageNet's.

  --card NAME          a GPU: its largest batch, and the epoch's shortest time by its roofline (a6000, h100, ...)
  --card_mib MIB       memory of the GPU, where that differs from the card's
  --batches LIST       images at once to tabulate, e.g. 36,48,64 (default: powers of two)
  --layers             a row for each layer: parameters, output, FLOPs, bytes kept for backward
  --world_size N       GPUs that share the global batch (default 1, or the run's)
  --run RUN            epoch time from the last steps that this run measured; its own recipe, unless --config is given
  --images_per_s R     epoch time from this speed of all GPUs together
  --conv_bias          give every convolution a bias, as the slides' ResNets have
  --scale 1..1024      predict speed and time on so many GPUs from the step of one (--run, --images_per_s or --card)
  --node_gpus N, --inside_gb_s R, --outside_gb_s R, --latency_us T
                       for --scale: GPUs a node (8), links within it (200), of a node to others (50), a hop (15)
  --json               print one JSON object instead

Options of train, which apply here too:
"""


def options_parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog="pipeline estimate", add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--card")
    own.add_argument("--card_mib", "--card-mib", type=float)
    own.add_argument("--batches", default=",".join(map(str, BATCHES)))
    own.add_argument("--layers", action="store_true")
    own.add_argument("--world_size", "--world-size", type=int)
    own.add_argument("--run")
    own.add_argument("--images_per_s", "--images-per-s", type=float)
    own.add_argument("--conv_bias", "--conv-bias", action="store_true")
    own.add_argument("--scale")
    own.add_argument("--node_gpus", "--node-gpus", type=int, default=8)
    own.add_argument("--inside_gb_s", "--inside-gb-s", type=float, default=200.0)
    own.add_argument("--outside_gb_s", "--outside-gb-s", type=float, default=50.0)
    own.add_argument("--latency_us", "--latency-us", type=float, default=15.0)
    own.add_argument("--json", action="store_true")
    return own


def parse_batches(text: str) -> list[int]:
    """'36,48' -> [36, 48]. Raises UserError."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise UserError(f"--batches {text} is no list of sizes; give e.g. 36,48,64")
    return batches


def data_set(config: Config) -> tuple[int, int]:
    """(training images, classes): of the index at data.root, or ImageNet's."""
    if not config.data.root:
        return TRAIN_IMAGES, CLASSES
    root = Path(config.data.root).expanduser()
    index = open_index(Path(config.data.index).expanduser() if config.data.index else index_folder(root))
    return len(index.splits["train"]), index.num_classes


def measured_rate(options: argparse.Namespace) -> tuple[float, str, int] | None:
    """(images/s of all GPUs, where it comes from, of how many), or None where nothing was measured."""
    if options.images_per_s is not None:
        if not options.images_per_s > 0:
            raise UserError(f"--images_per_s {options.images_per_s}: give a number above 0")
        return options.images_per_s, "as given", options.world_size or 1
    if options.run is None:
        return None
    ledger = Path(options.run).expanduser() / "metrics.jsonl"
    if not ledger.exists():
        raise UserError(f"--run {options.run} has no metrics.jsonl; give the folder of a run")
    step_s = median_step_s(read_tail(ledger), 1)  # of one image
    if step_s is None:
        raise UserError(f"--run {options.run} has no training step yet; give another run")
    starts = (row for row in read_rows(ledger) if row.get("event") in ("started", "resumed"))
    world_size = max(starts, key=lambda row: row.get("time", 0), default={}).get("world_size", 1)
    return 1 / step_s, f"measured by {options.run}", world_size


def estimate(config: Config, options: argparse.Namespace) -> dict:
    """All that the verb shows, as plain values. Bytes are in MiB, times in seconds, FLOPs of one image."""
    from pipeline.insight.estimate.memory import MIB, Tracer, by_kind, optimizer_states, step_memory, weight_bytes
    from pipeline.model.sizes import check_image_sizes

    batches = parse_batches(options.batches)
    images, classes = data_set(config)
    classes = config.model.num_classes or classes
    card = find_card(options.card) if options.card else None
    card_mib = options.card_mib or (card.memory_mib if card else None)
    rate = measured_rate(options)
    if options.world_size is None:
        options.world_size = rate[2] if rate else 1
    if options.world_size < 1 or config.train.global_batch_size % options.world_size:
        raise UserError(f"--world_size {options.world_size} does not divide the global batch; give a divisor")
    if rate and rate[2] != options.world_size:
        raise UserError(
            f"--world_size {options.world_size}: {options.run} was measured on {rate[2]}; leave it out, or see --scale"
        )
    local = config.train.global_batch_size // options.world_size
    at_once = min(config.train.micro_batch_size or local, local)
    check_image_sizes(config)
    tracer = Tracer(config, classes, options.conv_bias)
    memory = step_memory(tracer, at_once)
    step = tracer.trace(at_once)
    trained = sum(p.numel() for p in tracer.model.parameters() if p.requires_grad)
    weights = weight_bytes(tracer.model)
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
        "averaged": config.ema.decay > 0,
        "weights_mib": memory.weights_mib,
        "gradients_mib": memory.gradients_mib,
        "optimizer": config.optim.name,
        "optimizer_mib": memory.optimizer_mib,
        "kept_mib": memory.kept_mib,
        "image_mib": memory.image_mib,
        "passing_mib": memory.passing_mib,
        "images_at_once": at_once,
        "local_batch": local,
        "card_mib_by_batch": {n: memory.card_mib(n) for n in batches},
        "weights_file_mib": weights / MIB,
        "checkpoint_mib": (weights * (2 if config.ema.decay else 1) + 4 * trained * optimizer_states(config)) / MIB,
        "training_images": images,
        "world_size": options.world_size,
    }
    if card_mib is not None:
        facts |= {"card": options.card, "card_mib": card_mib, "largest_batch": memory.most_images(card_mib)}
    if rate is not None:
        facts |= {"images_per_s": rate[0], "images_per_s_from": rate[1], "epoch_s": images / rate[0]}
    if card is not None:
        facts["roofline_epoch_s"] = roofline_epoch_s(step, card, images, options.world_size)
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


def scale(config: Config, options: argparse.Namespace, facts: dict, roofline_s: float | None) -> dict:
    """What `scaling` predicts. roofline_s: a step of one GPU by its roofline, if nothing is measured.

    Raises UserError where nothing tells the time of a step.
    """
    from pipeline.insight.estimate.scaling import Links, parse_scale, scaling_facts

    sizes = parse_scale(options.scale)
    if min(options.node_gpus, options.inside_gb_s, options.outside_gb_s) <= 0 or options.latency_us < 0:
        raise UserError("--node_gpus, --inside_gb_s and --outside_gb_s must be above 0, --latency_us 0 or more")
    if "images_per_s" in facts:
        alone_s = config.train.global_batch_size / facts["images_per_s"]
        origin = f"{facts['images_per_s_from']}, {options.world_size} processes"
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


def roofline_epoch_s(step, card: Card, images: int, world_size: int) -> float:
    """The shortest an epoch can take: every kernel at the card's peak, no waiting for data or for other ranks."""
    return step.seconds(card.half_tflops, card.tflops, card.gb_s) / step.images * images / world_size


def _flops(value: float) -> str:
    return f"{value / 1e9:,.2f} G"


def render(facts: dict) -> str:
    """The page that a person reads."""
    from pipeline.insight.estimate.memory import CONTEXT_MIB, SLACK

    layout = ", channels_last" if facts["channels_last"] else ""
    frozen = facts["parameters"] - facts["trained_parameters"]
    lines = [
        f"{facts['model']} for {facts['classes']:,} classes, {facts['image_size']} px, {facts['precision']}{layout}",
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
        f"  {facts['passing_mib']:10,.2f}  in passing, each image",
        f"  {CONTEXT_MIB:10,.2f}  CUDA context and workspaces, and {SLACK:.0%} on all above for the allocator (fitted)",
        "",
        "  images at once  " + " ".join(f"{n:>8,}" for n in facts["card_mib_by_batch"]),
        "  GPU MiB         " + " ".join(f"{mib:8,.0f}" for mib in facts["card_mib_by_batch"].values()),
    ]
    if "card_mib" in facts:
        name = facts["card"] or "the card"
        lines += ["", f"  at most {facts['largest_batch']:,} images at once on {name} ({facts['card_mib']:,.0f} MiB)"]
    lines += [""] if "epoch_s" in facts or "roofline_epoch_s" in facts else []
    many = f"{facts['training_images']:,} images"
    if "epoch_s" in facts:
        speed = f"{facts['images_per_s']:,.0f} images/s ({facts['images_per_s_from']})"
        lines.append(f"An epoch of {many} takes {duration(facts['epoch_s'])} at {speed}")
    if "roofline_epoch_s" in facts:
        cards = f"{facts['world_size']} x {facts['card']}"
        lines.append(
            f"An epoch of {many} takes at least {duration(facts['roofline_epoch_s'])} on {cards}, "
            f"{facts['images_at_once']} images at once (roofline: a bound, not a forecast)"
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
    try:
        options, rest = options_parser().parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if {"-h", "--help"} & set(rest):
        print(ABOUT)
    recipe_given = any(item.partition("=")[0] == "--config" for item in rest)
    if options.run and not recipe_given and (Path(options.run).expanduser() / "config.yaml").exists():
        rest = ["--config", str(Path(options.run).expanduser() / "config.yaml"), *rest]
    facts = estimate(parse_config(rest, "estimate"), options)
    print(json.dumps(facts) if options.json else render(facts), flush=True)
    return EXIT_OK
