"""What one step reports, and what it leaves alone if it does not train."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.save import Saver
from megalite.checkpoint.state import State
from megalite.config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig, resolve
from megalite.data.dataset import PretrainDataset, Samples
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.launch.stop import Stop
from megalite.optim.loss_scale import first_scale
from megalite.optim.lr import learning_rate
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads
from megalite.run.objective import PRETRAINING
from megalite.run.step import Outcome, train_step

MODEL = ModelConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, ffn_hidden_size=24)


class Asked(Stop):
    """A stop that listens to no signal: threads cannot."""

    def __init__(self, reason: str = "") -> None:
        self.reason = reason

    def asked(self) -> bool:
        return bool(self.reason)


@pytest.fixture
def dataset(tmp_path: Path) -> PretrainDataset:
    with IndexedWriter(tmp_path / "text", 64) as writer:
        for document in range(50):
            writer.add_document([(document + i) % 64 for i in range(16)])
    return PretrainDataset(IndexedDataset(tmp_path / "text"), 8, seed=1)


def config(dtype: str = "fp64", dp: int = 1, **train: Any) -> Config:
    optim = OptimConfig(lr=1e-2, warmup_samples=8, loss_scale_initial=8.0, loss_scale_min=1.0)
    batch = TrainConfig(dtype=dtype, seq_len=8, micro_batch_size=2, global_batch_size=4, **train)
    return resolve(Config(MODEL, ParallelConfig(tp=1, pp=1, dp=dp), optim=optim, train=batch), dp)


def start(c: Config, world: World) -> tuple[Engine, State]:
    return build(c, world), State(loss_scale=first_scale(c))


def step(engine: Engine, state: State, dataset: Samples, reason: str = "") -> Outcome:
    saver = Saver(Path("nowhere"), engine.config, engine.mesh)
    return train_step(engine, PRETRAINING, dataset, state, Asked(reason), saver)


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in engine.parameters.items()}


def is_untouched(engine: Engine, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in engine.parameters.items())


def spoil(monkeypatch: pytest.MonkeyPatch, loss: Callable[[float], float], grad: float = 1.0) -> None:
    """Change the loss that a rank reports, and multiply its gradients."""
    forward_backward = Engine.forward_backward

    def spoiled(engine: Engine, microbatches: Sequence[Microbatch], *more: float) -> dict[str, float]:
        sums = forward_backward(engine, microbatches, *more)
        engine.grads.flat.mul_(grad)
        return {**sums, "loss": loss(sums["loss"])}

    monkeypatch.setattr(Engine, "forward_backward", spoiled)


def test_a_step_that_trains(dataset: PretrainDataset) -> None:
    engine, state = start(config(), SoloWorld())
    before = weights(engine)
    first = step(engine, state, dataset)
    assert (first.samples, first.figures.keys(), len(first.microbatches)) == (range(0, 4), {"loss"}, 2)
    assert first.loss == pytest.approx(math.log(64), rel=0.1)
    assert first.lr == learning_rate(engine.config.optim, 0)
    assert (first.skipped, first.diverged, first.stop, first.saves) == ("", "", "", (0.0, 0.0))
    assert (state.step, state.consumed_samples, state.skipped_steps) == (1, 4, 0)
    assert not is_untouched(engine, before)
    second = step(engine, state, dataset)
    assert (second.samples, state.consumed_samples) == (range(4, 8), 8)
    assert second.lr == learning_rate(engine.config.optim, 4) > first.lr


def test_every_rank_has_the_same_outcome(dataset: PretrainDataset) -> None:
    """Also of a stop that one of them was asked for; only the wording is its own."""

    def main(world: World) -> Outcome:
        engine, state = start(config(dp=2), world)
        return step(engine, state, dataset, "SIGTERM" if world.rank == 1 else "")

    first, second = run_threads(2, main)
    assert (first.stop, second.stop) == ("another rank received a stop signal", "SIGTERM")
    for name in set(Outcome.__dataclass_fields__) - {"microbatches", "stop"}:
        assert getattr(first, name) == getattr(second, name)
    alone = step(*start(config(), SoloWorld()), dataset)
    assert first.loss == pytest.approx(alone.loss, rel=1e-12)
    assert first.grad_norm == pytest.approx(alone.grad_norm, rel=1e-6)
    assert [mb.samples.tolist() for each in (first, second) for mb in each.microbatches if mb.samples is not None] == [
        [0, 1],
        [2, 3],
    ]


def test_a_batch_that_is_passed_over(dataset: PretrainDataset) -> None:
    engine, state = start(config(skip_samples="2:3"), SoloWorld())
    before = weights(engine)
    outcome = step(engine, state, dataset)
    assert (outcome.microbatches, outcome.figures, outcome.loss) == ([], {}, None)
    assert (outcome.skipped, outcome.diverged) == ("passed over: no update", "")
    assert (state.step, state.consumed_samples, state.skipped_steps) == (1, 4, 1)
    assert is_untouched(engine, before)


def test_a_batch_without_a_trained_token(dataset: PretrainDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = dataset.batch
    monkeypatch.setattr(dataset, "batch", lambda i: batch(i)._replace(loss_mask=0 * batch(i).loss_mask))
    engine, state = start(config(), SoloWorld())
    before = weights(engine)
    outcome = step(engine, state, dataset)
    assert (outcome.loss, outcome.skipped) == (None, "no token of this batch is trained: no update")
    assert (state.step, state.skipped_steps) == (1, 1)
    assert is_untouched(engine, before)


@pytest.mark.parametrize("dtype", ["fp64", "fp16"])
def test_a_loss_that_is_not_finite(dataset: PretrainDataset, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    spoil(monkeypatch, lambda loss: math.nan)
    engine, state = start(config(dtype), SoloWorld())
    before, counters = weights(engine), dataclasses.asdict(state)
    outcome = step(engine, state, dataset)
    assert outcome.diverged.startswith("step 1: loss nan, gradient norm ")
    assert "training has diverged; the weights of the last checkpoint are untouched. Lower optim.lr" in outcome.diverged
    assert dataclasses.asdict(state) == counters
    assert is_untouched(engine, before)


def test_gradients_that_overflow(dataset: PretrainDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 halves its loss scale and goes on, until it cannot be halved; other types have diverged."""
    spoil(monkeypatch, lambda loss: loss, math.inf)
    engine, state = start(config("fp16"), SoloWorld())
    before = weights(engine)
    found = [step(engine, state, dataset) for _ in range(4)]
    assert [each.loss_scale for each in found] == [8, 4, 2, 1]
    assert [each.skipped for each in found[:2]] == [
        "skipped: gradients overflow at scale 8",
        "skipped: gradients overflow at scale 4",
    ]
    assert [each.diverged == "" for each in found] == [True, True, True, False]
    assert found[3].diverged.startswith("gradients overflow fp16 even at a loss scale of 1")
    assert (state.step, state.skipped_steps, state.loss_scale) == (3, 3, 1)
    assert is_untouched(engine, before)

    other = step(*start(config("fp64"), SoloWorld()), dataset)
    assert "gradient norm" in other.diverged
    assert other.loss is not None
    assert math.isfinite(other.loss)
