"""A run's whole configuration: its groups, its identity, and its form as YAML."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.augment import AugmentConfig, check_augment
from pipeline.config.average import EmaConfig, EvaluationConfig, check_ema, check_evaluation
from pipeline.config.data import DataConfig, ResolvedDataConfig, check_data
from pipeline.config.fields import Check, runtime_field
from pipeline.config.model import ModelConfig, check_model
from pipeline.config.optim import OptimConfig, check_optim
from pipeline.config.running import (
    CheckpointConfig,
    GuardConfig,
    TrackingConfig,
    check_checkpoint,
    check_guard,
    check_tracking,
)
from pipeline.config.schedule import ScheduleConfig, check_schedule
from pipeline.config.train import TrainConfig, check_train
from pipeline.config.yaml_text import dump_yaml
from pipeline.errors import UserError


@dataclass(frozen=True)
class RawConfig:
    """A run as the user gives it: its recipe, and where it runs."""

    run_dir: str = runtime_field("")
    """The run's folder: config, ledger, checkpoints, W&B. The same command again continues what is there."""
    resume: str = runtime_field("auto")
    """auto: go on from the newest good checkpoint in run_dir; never: refuse to start where one is;
    PATH: start from that checkpoint folder."""
    about: dict[str, str | float | bool | list | dict | None] = field(
        default_factory=dict, metadata={"semantic": False}
    )
    """What the recipe says of itself: source, published and measured results."""
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def resolve(self, given: frozenset[str] = frozenset()) -> "Config":
        """The run's configuration: defaults that depend on other options filled in, and every value checked.

        given: the options that the command line gave.

        Raises UserError for the first impossible value.
        """
        groups = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return Config(**(groups | {"data": self.data.resolve(self.model.name), "given": given}))


@dataclass(frozen=True, kw_only=True)
class Config(RawConfig):
    """A run's configuration, resolved and checked: what the package works with. Made by `RawConfig.resolve`."""

    data: ResolvedDataConfig
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False, metadata={"option": False})
    """Names of the options that the command line gave; no option itself."""

    def __post_init__(self) -> None:
        for name, value, good, remedy in check_all(self):
            if not good:
                raise UserError(f"--{name} is {value}: {remedy}")


def check_all(c: Config) -> Iterator[Check]:
    """Each knob's impossible values, group by group."""
    yield from check_data(c.data)
    yield from check_augment(c.augment, c.train.global_batch_size, c.train.micro_batch_size)
    yield from check_model(c.model)
    yield from check_optim(c.optim)
    yield from check_schedule(c.schedule)
    yield from check_ema(c.ema)
    yield from check_train(c.train)
    yield from check_evaluation(c.evaluation)
    yield from check_guard(c.guard)
    yield from check_checkpoint(c.checkpoint)
    yield from check_tracking(c.tracking)


def semantic_config(config: Any, prefix: str = "", everything: bool = False) -> dict[str, Any]:
    """The run's identity as flat names: {"optim.lr": 0.1, ...}; fields made with `runtime_field` are left out, unless
    `everything` is asked for."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        if not item.metadata.get("option", True):
            continue
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= semantic_config(value, f"{prefix}{item.name}.", everything)
        elif everything or item.metadata.get("semantic", True):
            flat[prefix + item.name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `--config` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    settings = dataclasses.asdict(config)
    del settings["given"]
    return dump_yaml(plain(settings))
