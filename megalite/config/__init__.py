"""The configuration of a run: plain frozen dataclasses, read from YAML and `a.b=c` overrides, checked in one place.

Nothing here imports torch: a mistake is reported within a second.
"""

from megalite.config.check import check
from megalite.config.errors import ConfigError
from megalite.config.model import ResolvedModel, resolve_model
from megalite.config.parse import from_mapping, parse_command_line
from megalite.config.request import Hardware, Request
from megalite.config.resolved import Resolved, reopen, resolve
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
    "Resolved",
    "ResolvedModel",
    "TrainConfig",
    "TuneConfig",
    "check",
    "from_mapping",
    "key_help",
    "parse_command_line",
    "reopen",
    "resolve",
    "resolve_model",
    "to_yaml",
]
