"""Every knob of a run, typed, with units. A recipe is a YAML file of these; nothing heavy is imported here.

Fields made with `runtime_field(...)` say how a run is carried out (where, with how many threads, how often
saved) and may change when it resumes. All others define the run: changing one on the same run folder is an error.
"""

from pipeline.config.augment import AugmentConfig
from pipeline.config.average import EmaConfig, EvaluationConfig
from pipeline.config.data import DataConfig, ResolvedDataConfig
from pipeline.config.model import INPUT_SIZES, ModelConfig
from pipeline.config.optim import OptimConfig
from pipeline.config.parse import (
    from_dict,
    load_config,
    make_config_parser,
    parse_config,
    recipe_names,
    recipes_folder,
    resolve_recipe,
)
from pipeline.config.run import Config, RawConfig, semantic_config, to_yaml
from pipeline.config.running import CheckpointConfig, GuardConfig, TrackingConfig
from pipeline.config.schedule import ScheduleConfig
from pipeline.config.train import TrainConfig

__all__ = [
    "INPUT_SIZES",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EmaConfig",
    "EvaluationConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimConfig",
    "RawConfig",
    "ResolvedDataConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
    "from_dict",
    "semantic_config",
    "load_config",
    "make_config_parser",
    "parse_config",
    "recipe_names",
    "recipes_folder",
    "resolve_recipe",
    "to_yaml",
]
