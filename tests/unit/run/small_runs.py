"""Runs of a tiny model in one process, and what they wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalite.config import Config
from megalite.data.sets import DataSets
from megalite.engine.restore import State
from megalite.parallel.groups import SoloWorld
from megalite.run.objective import objective_of
from megalite.run.trainer import train
from megalite.watch.metrics import read_metrics

VOCAB, SEQ = 120, 8
HELDOUT = {"a": 100, "b": 41, "c": 2}  # tokens; the last window of b is full, the others' are not
SHARDS = "rank-00000-000.safetensors"
Rows = list[dict[str, Any]]
Make = Callable[..., Config]


def run(config: Config, resume: Path | None = None) -> State:
    return train_on(config, open_data(config), resume)


def open_data(config: Config) -> DataSets:
    return objective_of(config).open_data(config, True)


def train_on(config: Config, data: DataSets, resume: Path | None = None) -> State:
    return train(config, objective_of(config), data, SoloWorld(), resume)


def rows(config: Config, kind: str) -> Rows:
    return read_metrics(Path(config.train.run_dir)).get(kind, [])


def heldout(config: Config, step: int) -> dict[str, float]:
    return {row["name"]: row["loss"] for row in rows(config, "eval") if row["step"] == step}
