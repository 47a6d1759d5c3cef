"""The rows of objectives: which one trains a configuration, and that a new row needs nothing else."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from megalite.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig, resolve
from megalite.data.indexed import IndexedWriter
from megalite.parallel.groups import SoloWorld
from megalite.run.objective import OBJECTIVES, PRETRAINING, TUNING, Objective, objective_of
from megalite.run.trainer import train
from megalite.watch.metrics import read_metrics


@pytest.mark.parametrize(
    ("data", "expected"),
    [({}, PRETRAINING), ({"path": "text"}, PRETRAINING), ({"sft": "chats.jsonl"}, TUNING)],
)
def test_the_row_of_a_configuration(data: dict[str, str], expected: Objective) -> None:
    assert objective_of(Config(data=DataConfig(**data))) is expected


@pytest.mark.parametrize("key", ["data.path", "data.sft"])
def test_a_row_says_which_data_it_misses(key: str) -> None:
    row = {"data.path": PRETRAINING, "data.sft": TUNING}[key]
    with pytest.raises(ValueError, match=f"^{key} is not set: "):
        row.open_data(Config(), True)


@pytest.mark.parametrize("row", OBJECTIVES, ids=["tuning", "pretraining"])
def test_the_loss_is_a_mean_over_weights(row: Objective) -> None:
    assert row.figures({"loss": 6.0, "tokens": 4.0}) == {"loss": 1.5}


def perplexity(sums: Mapping[str, float]) -> dict[str, float]:
    loss = sums["loss"] / sums["tokens"]
    return {"loss": loss, "token_perplexity": math.exp(loss)}


def test_a_figure_of_a_made_up_row_is_reported_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "text", 64) as writer:
        for document in range(20):
            writer.add_document([(document + i) % 64 for i in range(16)])
    config = resolve(
        Config(
            ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=24),
            ParallelConfig(tp=1, pp=1),
            data=DataConfig(path=str(tmp_path / "text"), valid_fraction=0.2),
            train=TrainConfig(
                run_dir=str(tmp_path / "run"), device="cpu", steps=2, seq_len=8, global_batch_size=4, micro_batch_size=2
            ),
        ),
        1,
    )
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, plot=False, interval=1))
    row = dataclasses.replace(PRETRAINING, figures=perplexity)
    train(config, row, row.open_data(config, True), SoloWorld(), None)
    metrics = read_metrics(tmp_path / "run")
    for kind in ("train", "eval"):
        assert metrics[kind]
        for line in metrics[kind]:
            assert line["token_perplexity"] == math.exp(line["loss"])
    out = capsys.readouterr().out
    last = metrics["train"][-1]
    assert f"loss {last['loss']:.4f}  token perplexity {last['token_perplexity']:.4f}  grad norm" in out
    last = metrics["eval"][-1]
    assert f"held out valid: {last['loss']:.4f} nats/token, token perplexity {last['token_perplexity']:.4f}" in out
