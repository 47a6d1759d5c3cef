"""A run folder to start from; data and configurations of tiny runs."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assets import asset

from megalite.checkpoint.save import write_whole
from megalite.config import Config, check, resolve, to_yaml
from megalite.config.schema import DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megalite.config.shapes import shapes
from megalite.data.indexed import IndexedWriter
from megalite.engine.restore import State

# the tests here share small_runs.py
sys.path.insert(0, str(Path(__file__).parent))
from small_runs import HELDOUT, SEQ, VOCAB, Make

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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefixes `train`, of a walk that can be learned, and `a`, `b`, `c`, in which no token comes twice."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "train", VOCAB) as writer:
        for _ in range(40):
            writer.add_document(((random.integers(VOCAB) + np.arange(random.integers(5, 40))) % VOCAB).tolist())
    for name, tokens in HELDOUT.items():
        with IndexedWriter(folder / name, VOCAB) as writer:
            for start in range(0, tokens, 30):
                writer.add_document(range(start, min(start + 30, tokens)))
            writer.sidecar = {"text_bytes": 4 * (tokens - 1)} if name == "b" else None
    return folder


@pytest.fixture
def make(data: Path, tmp_path: Path) -> Make:
    """A resolved configuration of a tiny model in float64; settings by `section__key`."""

    def _make(**settings: Any) -> Config:
        values: dict[str, dict[str, Any]] = {
            "model": {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 24},
            "parallel": {"tp": 1, "pp": 1},
            "data": {"path": str(data / "train"), "valid": {name: str(data / name) for name in HELDOUT}},
            "train": {
                "run_dir": str(tmp_path / "run"),
                "device": "cpu",
                "dtype": "fp64",
                "steps": 4,
                "seq_len": SEQ,
                "micro_batch_size": 2,
                "global_batch_size": 4,
            },
            "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_samples": 6},
            "log": {"plot": False},
        }
        for name, value in settings.items():
            section, _, key = name.partition("__")
            values.setdefault(section, {})[key] = value
        sections = {f.name: f.default_factory for f in dataclasses.fields(Config)}
        config = resolve(Config(**{s: sections[s](**v) for s, v in values.items()}), 1)  # type: ignore[operator]
        check(config, 1)
        return config

    return _make
