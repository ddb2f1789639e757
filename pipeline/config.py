"""Every knob of a run, typed, with units. A recipe is a YAML file of these; nothing heavy is imported here.

Fields made with `free(...)` say how a run is carried out (where, with how many threads, how often saved) and may change
when it goes on. All others are the run's identity: a change of one of them on the same run folder is an error.
"""

import dataclasses
import importlib.resources
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.command import make_parser, normalise
from pipeline.errors import UserError

#: pixels of the side that a network was made for, where that is not 224 (torchvision's published weights)
INPUT_SIZES = {
    "inception_v3": 299,
    **dict(zip((f"efficientnet_b{i}" for i in range(1, 8)), (240, 288, 300, 380, 456, 528, 600), strict=True)),
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
    **dict.fromkeys(("swin_v2_t", "swin_v2_s", "swin_v2_b"), 256),
}


def free(default: Any) -> Any:
    """A field that is no part of the run's identity."""
    return field(default=default, metadata={"identity": False})


@dataclass(frozen=True)
class DataConfig:
    root: str = free("")
    """Data root: an ILSVRC root, or a folder with train/ and val/ (or test/), or packed shards."""
    index: str | None = free(None)
    """Folder of the index; default ROOT/index."""
    loader: Literal["auto", "dali", "reference"] = free("auto")
    """DALI, or torch and torchvision (slower, same batches); auto: DALI where it is installed."""
    image_size: int | None = None
    """Pixels of a training image's side; default: what the network was made for (299 for Inception v3, else mostly
    224)."""
    val_size: int | None = None
    """Pixels of a validation image's side, cropped from the middle; default: image_size."""
    val_resize: int | None = None
    """Pixels that a validation image's shorter side is resized to before the crop; default: val_size * 256 / 224."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """RandomResizedCrop: smallest and largest share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: smallest and largest width / height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel (red, green, blue; 0 to 1), in the step."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Each channel is divided by this, in the step."""
    threads: int | None = free(None)
    """Decoding threads of a rank; default: this rank's share of the cores."""
    prefetch: int = free(2)
    """Batches decoded ahead of the step."""
    max_unreadable: int = free(100)
    """Samples that may turn out unreadable at run time (each is substituted) before the run stops."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "resnet152"
    """A torchvision classification model."""
    num_classes: int | None = None
    """Outputs of the head; default: the classes of the data set."""
    zero_init_residual: bool = False
    """Start each residual block as the identity: gamma of its last BatchNorm is 0 (Goyal et al. 2017, 5.1)."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks; default: over each rank's own images, as in Goyal et al. 2017."""
    aux_weight: float | None = None
    """Weight of the auxiliary heads' losses of googlenet and inception_v3; default: as published (0.3, 0.4). 0: without
    these heads."""
    dropout: float = 0.0
    """Share of the values before the head that is dropped in training, besides what the network drops by itself."""
    weights: str | None = None
    """Start from trained weights: torchvision's published ones by name (DEFAULT, IMAGENET1K_V1, ...), or a file. A head
    for other classes starts fresh."""
    freeze: str | None = None
    """Parameters that are not trained: "body" (all but the head), or patterns of names: "conv1.*,layer1.*"."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    """Peak learning rate; see lr_batch_size."""
    lr_batch_size: int | None = 256
    """The global batch that `lr` is meant for: the rate is scaled linearly to train.global_batch_size
    (Goyal et al. 2017). None: `lr` is used as it stands."""
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    """Weight decay of normalisation layers and biases."""
    body_lr: float = 1.0
    """Factor of the learning rate for all but the head."""
    l1: float = 0.0
    """Adds l1 * sum |w| over all trained parameters to the loss."""
    l2: float = 0.0
    """Adds l2 / 2 * sum w^2 over all trained parameters to the loss."""
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class ScheduleConfig:
    name: Literal["step", "cosine", "constant"] = "step"
    epochs: float = 90.0
    warmup_epochs: float = 0.0
    """Linear warm-up, step by step, from warmup_start to the peak."""
    warmup_start: float = 0.1
    """Learning rate of the first step as a share of the peak."""
    milestones: tuple[float, ...] = (30.0, 60.0)
    """step: epochs at which the rate is multiplied by gamma."""
    gamma: float = 0.1
    min_lr: float = 0.0
    """cosine: learning rate at the end."""


@dataclass(frozen=True)
class TrainConfig:
    global_batch_size: int = 256
    """Images a step over all ranks; stays the same when the number of ranks changes."""
    micro_batch_size: int | None = free(None)
    """Images that a rank puts through the network at once; the local batch is accumulated from as many as it
    takes. BatchNorm's statistics are over these. Default: the local batch at once."""
    eval_batch_size: int | None = free(None)
    """Validation images a rank at once; default: the micro batch."""
    eval_every_epochs: float = free(1.0)
    """Evaluate whenever this many epochs are done, and at the end."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    channels_last: bool = free(True)
    compile: bool = free(False)
    """torch.compile the model."""
    seed: int = 0
    max_steps: int | None = free(None)
    """Stop after this many steps in all, in the midst of the schedule; default: to its end."""
    device: Literal["auto", "cuda", "cpu"] = free("auto")
    deterministic: bool = free(False)
    """On CUDA: only deterministic kernels (slower), so that resuming is bit-exact there too. On CPU it is always."""


@dataclass(frozen=True)
class GuardConfig:
    nonfinite: Literal["skip", "stop"] = free("skip")
    """A loss or gradient that is NaN or infinite: leave that step's update out, on all ranks alike; or stop."""
    max_skipped: int = free(5)
    """Such steps in a row after which the run goes back to the last checkpoint before them."""
    max_rollbacks: int = free(2)
    """Times that a run goes back; at the next it stops."""
    rollback_lr_factor: float = free(0.5)
    """The learning rate is multiplied by this from the step on that the run went back to."""
    rollback_reshuffle: bool = free(False)
    """Draw the rest of that epoch in another order."""
    spike_factor: float = free(2.0)
    """A loss of so many times the median of the last 100 is marked in the ledger."""
    compare_every_steps: int = free(1000)
    """Compare the parameters of all ranks whenever this many steps are done, and before each checkpoint."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | None = free(None)
    """Save whenever this many steps are done."""
    every_minutes: float | None = free(15.0)
    """Save when the last save is this old."""
    every_epoch: bool = free(True)
    """Save at the end of each epoch."""
    keep: int = free(2)
    """Newest checkpoints kept, beside the best one."""


@dataclass(frozen=True)
class TrackingConfig:
    wandb: Literal["auto", "online", "offline", "disabled"] = free("auto")
    """auto: online with a key, offline without one; metrics.jsonl is written always."""
    project: str = free("imagenet")
    entity: str | None = free(None)
    name: str | None = free(None)
    """Name of the W&B run; default: the run folder's name."""
    report: bool = free(True)
    """Write report/index.html when the run is finished, and send its pictures to W&B."""
    print_every_s: float = free(30.0)
    """Seconds between plain progress lines where the output is no terminal."""


@dataclass(frozen=True)
class Config:
    """A run: its recipe and where it happens."""

    run_dir: str = free("")
    """The run's folder: config, ledger, checkpoints, W&B. The same command again continues what is there."""
    resume: str = free("auto")
    """auto: go on from the newest good checkpoint in run_dir; never: refuse to start where one is;
    PATH: start from that checkpoint folder."""
    about: dict[str, Any] = field(default_factory=dict, metadata={"identity": False})
    """What the recipe says of itself: source, published and measured results."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self):
        data = self.data
        size = data.image_size or INPUT_SIZES.get(self.model.name, 224)
        val_size = data.val_size or size
        sizes = {"image_size": size, "val_size": val_size, "val_resize": data.val_resize or round(val_size * 256 / 224)}
        object.__setattr__(self, "data", dataclasses.replace(data, **sizes))
        for name, value, good, remedy in _constraints(self):
            if not good:
                raise UserError(f"--{name} is {value}: {remedy}")


def _constraints(c: Config):
    """Each knob's impossible values: (name, value, is it good, what to give instead)."""

    def positive(name, value, optional=False):
        good = (value is None and optional) or (value is not None and 0 < value < math.inf)
        return name, value, good, "give a number above 0"

    def at_least_zero(name, value):
        return name, value, 0 <= value < math.inf, "give a number of 0 or more"

    def share(name, value):
        return name, value, 0 <= value <= 1, "give a number from 0 to 1"

    yield positive("data.image_size", c.data.image_size)
    yield positive("data.val_size", c.data.val_size)
    yield "data.val_resize", c.data.val_resize, c.data.val_resize >= c.data.val_size, "give at least data.val_size"
    low, high = c.data.crop_area
    yield (
        "data.crop_area",
        [low, high],
        0 < low <= high <= 1,
        "give two shares of the area, 0 < smallest <= largest <= 1",
    )
    low, high = c.data.crop_ratio
    yield "data.crop_ratio", [low, high], 0 < low <= high < math.inf, "give two ratios, 0 < smallest <= largest"
    yield share("data.flip", c.data.flip)
    yield "data.std", list(c.data.std), min(c.data.std) > 0, "give three numbers above 0"
    yield positive("data.threads", c.data.threads, optional=True)
    yield positive("data.prefetch", c.data.prefetch)
    yield at_least_zero("data.max_unreadable", c.data.max_unreadable)
    yield positive("model.num_classes", c.model.num_classes, optional=True)
    yield at_least_zero("model.aux_weight", c.model.aux_weight or 0)
    yield "model.dropout", c.model.dropout, 0 <= c.model.dropout < 1, "give a number from 0 to below 1"
    yield positive("optim.lr", c.optim.lr)
    yield positive("optim.lr_batch_size", c.optim.lr_batch_size, optional=True)
    yield "optim.momentum", c.optim.momentum, 0 <= c.optim.momentum < 1, "give a number from 0 to below 1"
    nesterov = not c.optim.nesterov or c.optim.momentum > 0
    yield "optim.nesterov", c.optim.nesterov, nesterov, "give optim.momentum above 0, or leave nesterov off"
    yield (
        "optim.betas",
        list(c.optim.betas),
        all(0 <= b < 1 for b in c.optim.betas),
        "give two numbers from 0 to below 1",
    )
    yield positive("optim.eps", c.optim.eps)
    yield at_least_zero("optim.weight_decay", c.optim.weight_decay)
    yield at_least_zero("optim.norm_weight_decay", c.optim.norm_weight_decay)
    yield positive("optim.body_lr", c.optim.body_lr)
    yield at_least_zero("optim.l1", c.optim.l1)
    yield at_least_zero("optim.l2", c.optim.l2)
    smoothing = c.optim.label_smoothing
    yield "optim.label_smoothing", smoothing, 0 <= smoothing < 1, "give a number from 0 to below 1"
    yield positive("schedule.epochs", c.schedule.epochs)
    warmup = c.schedule.warmup_epochs
    yield "schedule.warmup_epochs", warmup, 0 <= warmup < c.schedule.epochs, "give 0 or more, below schedule.epochs"
    yield share("schedule.warmup_start", c.schedule.warmup_start)
    yield positive("schedule.gamma", c.schedule.gamma)
    yield at_least_zero("schedule.min_lr", c.schedule.min_lr)
    milestones = list(c.schedule.milestones)
    rising = milestones == sorted(set(milestones)) and min(milestones, default=1) > 0
    yield "schedule.milestones", milestones, rising, "give rising epochs above 0"
    yield positive("train.global_batch_size", c.train.global_batch_size)
    yield positive("train.micro_batch_size", c.train.micro_batch_size, optional=True)
    yield positive("train.eval_batch_size", c.train.eval_batch_size, optional=True)
    yield positive("train.eval_every_epochs", c.train.eval_every_epochs)
    yield positive("train.max_steps", c.train.max_steps, optional=True)
    yield "train.seed", c.train.seed, 0 <= c.train.seed < 2**63, "give a whole number from 0 to 2^63 - 1"
    yield positive("guard.max_skipped", c.guard.max_skipped)
    yield at_least_zero("guard.max_rollbacks", c.guard.max_rollbacks)
    factor = c.guard.rollback_lr_factor
    yield "guard.rollback_lr_factor", factor, 0 < factor <= 1, "give a number above 0, at most 1"
    yield "guard.spike_factor", c.guard.spike_factor, c.guard.spike_factor > 1, "give a number above 1"
    yield positive("guard.compare_every_steps", c.guard.compare_every_steps)
    yield positive("checkpoint.every_steps", c.checkpoint.every_steps, optional=True)
    yield positive("checkpoint.every_minutes", c.checkpoint.every_minutes, optional=True)
    yield positive("checkpoint.keep", c.checkpoint.keep)
    yield positive("tracking.print_every_s", c.tracking.print_every_s)


def identity(config: Any, prefix: str = "") -> dict[str, Any]:
    """The run's identity as flat names: {"optim.lr": 0.1, ...}; fields made with `free` are left out."""
    flat = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= identity(value, f"{prefix}{item.name}.")
        elif item.metadata.get("identity", True):
            flat[prefix + item.name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `--config` reads back."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def recipes_folder() -> Path:
    return Path(str(importlib.resources.files("pipeline") / "recipes"))


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def resolve_recipe(name: str) -> str:
    """The file of a recipe: a path as it is, a name from the package. Raises UserError for neither."""
    if Path(name).is_file():
        return name
    packaged = recipes_folder() / f"{name}.yaml"
    if os.sep not in name and packaged.is_file():
        return str(packaged)
    raise UserError(f"--config {name} is neither a file nor a recipe; the recipes are: {', '.join(recipe_names())}")


def make_config_parser(prog: str):
    """A parser for `Config`: `--config NAME_OR_FILE`, dotted overrides, `--print_config`."""
    from jsonargparse import ActionConfigFile, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = make_parser(prog, "Train a recipe. The same command again continues the run in run_dir.")
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe's name or a YAML file")
    parser.add_class_arguments(Config)
    return parser


def _flags(item: Any, prefix: str = "--") -> set[str]:
    names = set()
    for part in dataclasses.fields(item):
        if dataclasses.is_dataclass(part.type):
            names |= _flags(part.type, f"{prefix}{part.name}.")
        elif part.type is bool:
            names.add(prefix + part.name)
    return names


def parse_config(argv: list[str], verb: str = "train") -> Config:
    """The configuration that a command line asks for. Exits with code 2 and one line on an impossible one."""
    argv = normalise(list(argv), _flags(Config))
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            argv[i + 1] = resolve_recipe(argv[i + 1])
        elif argument.startswith("--config="):
            argv[i] = f"--config={resolve_recipe(argument.removeprefix('--config='))}"
    parsed = make_config_parser(f"pipeline {verb}").parse_args(argv)
    return from_dict(parsed.as_dict())


def load_config(path: Path, overrides: list[str] | None = None, verb: str = "train") -> Config:
    """A configuration saved by a run, with overrides from a command line."""
    return parse_config(["--config", str(path), *(overrides or [])], verb)


def from_dict(values: dict[str, Any]) -> Config:
    """A `Config` from nested plain values as jsonargparse gives them."""
    values = {key: value for key, value in values.items() if key != "config"}
    for item in dataclasses.fields(Config):
        if dataclasses.is_dataclass(item.type) and isinstance(values.get(item.name), dict):
            group = {k: tuple(v) if isinstance(v, list) else v for k, v in values[item.name].items()}
            values[item.name] = item.type(**group)
    return Config(**values)
