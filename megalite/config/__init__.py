"""The configuration of a run: plain frozen dataclasses, read from YAML and `a.b=c` overrides, checked in one place.

Nothing here imports torch, so that a mistake is told within a second.
"""

from megalite.config.check import check, resolve
from megalite.config.errors import ConfigError
from megalite.config.parse import Hardware, Request, from_mapping, parse_command_line
from megalite.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
)
from megalite.config.show import key_help, to_yaml

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Hardware",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Request",
    "TrainConfig",
    "TuneConfig",
    "check",
    "from_mapping",
    "key_help",
    "parse_command_line",
    "resolve",
    "to_yaml",
]
