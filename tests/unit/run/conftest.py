"""A run folder to start from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import asset

from megalite.checkpoint.save import write_whole
from megalite.config import Config, resolve, to_yaml
from megalite.config.schema import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megalite.config.shapes import shapes
from megalite.engine.restore import State

ONE = ParallelConfig(tp=1, pp=1, sp=False)


MODEL = ModelConfig(vocab_size=32000, hidden_size=8, num_layers=3, num_heads=2, ffn_hidden_size=8, dropout=0.125)


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """A function that makes a run folder of zero weights, with its tokenizer, at its last step, 7."""
    return _make_run


def _make_run(folder: Path, **sections: Any) -> Path:
    train = TrainConfig(run_dir=str(folder), seq_len=64, steps=7, global_batch_size=4, micro_batch_size=2)
    data = DataConfig(path="data/old", valid={"en": "data/en"}, tokenizer="tokenizers/old.model")
    config = resolve(Config(**{"model": MODEL, "parallel": ONE, "train": train, "data": data, **sections}), 1)
    parameters = config.shapes.factors if config.tune.mode == "lora" else shapes(config.model)
    described = {f"weight.{name}": (torch.float32, shape) for name, shape in parameters.items()}
    state = State(step=7, consumed_samples=28, base="0123456789abcdef /gone")
    step = folder / "checkpoints" / "step-00000007"
    write_whole(step, config, described, lambda name: torch.zeros(described[name][1]), dataclasses.asdict(state))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "tokenizer.model").write_bytes(asset("mistral-v1/tokenizer.model").read_bytes())
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(_make_run(Path("runs/mine")))
