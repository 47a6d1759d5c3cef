"""Which model is meant, and how it is laid out over the ranks of this run. No torch: mistakes are told first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import find, read_manifest
from megalite.config import (
    Config,
    ConfigError,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    check,
    from_mapping,
    resolve,
)
from megalite.config.check import valid_tp
from megalite.config.load import read_yaml_file
from megalite.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Source:
    """A model's weights and tokenizer, and the configuration of this run of it: no dp, no sp.

    `start`: ids that a text begins with. `stops`: ids that end one. `limit`: positions the model has, None: no bound.
    """

    folder: Path
    config: Config
    tokenizer: Tokenizer
    start: tuple[int, ...]
    stops: frozenset[int]
    limit: int | None


def open_source(
    path: str | Path,
    *,
    tp: int | None = None,
    pp: int | None = None,
    world_size: int = 1,
    device: str = "auto",
    dtype: str | None = None,
    timeout_s: float = 600.0,
) -> Source:
    """The model of a run folder or of one of its checkpoints, for tp x pp = world_size ranks.

    `dtype`: of weights and activations; None: the run's. ValueError in one line for all that is wrong with it.
    """
    folder = find(path)
    run_dir = folder.parent.parent
    saved = read_yaml_file(run_dir / "config.yaml")
    # how it was trained is of no matter here, and an older run may say it in other words
    trained = from_mapping({key: saved[key] for key in ("model", "train") if key in saved}, f"{run_dir}/config.yaml")
    read_manifest(folder)
    found = [run_dir / name for name in ("tokenizer.model", "tokenizer.json") if (run_dir / name).is_file()]
    if not found:
        raise ValueError(f"{run_dir} has no tokenizer.model or tokenizer.json; copy the one its data was made with")
    tokenizer = load_tokenizer(found[0])
    settings = {"seq_len": trained.train.seq_len, "kernels": trained.train.kernels, "device": device}
    config = lay_out(trained.model, tp, pp, world_size, timeout_s, dtype=dtype or trained.train.dtype, **settings)
    # documents are joined by the end-of-document token, so a text begins after one
    end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    limit = config.model.max_positions if config.model.position == "learned" else None
    return Source(folder, config, tokenizer, end, frozenset(end), limit)


def lay_out(
    model: ModelConfig, tp: int | None, pp: int | None, world_size: int, timeout_s: float, **train: Any
) -> Config:
    """The configuration of `model` on tp x pp ranks; what is not given follows from the number of ranks.

    ConfigError where they do not make up the world, or cannot cut the model.
    """
    if tp is None and pp is None:
        tp = max(size for size in valid_tp(model) if world_size % size == 0)
    if min(tp or 1, pp or 1) < 1 or 0 in (tp, pp):
        raise ConfigError(f"tp {tp} x pp {pp}: both are at least 1")
    tp, pp = tp or max(1, world_size // (pp or 1)), pp or max(1, world_size // (tp or 1))
    if tp * pp != world_size:
        start = f"start it with torchrun --nproc_per_node {tp * pp}" if tp * pp > 1 else "leave out torchrun"
        raise ConfigError(f"tp {tp} x pp {pp} make {tp * pp} ranks, but the world size is {world_size}; {start}")
    config = Config(
        model=model, parallel=ParallelConfig(tp=tp, pp=pp, sp=False, timeout_s=timeout_s), train=TrainConfig(**train)
    )
    config = resolve(config, world_size)
    check(config, world_size)
    return config
