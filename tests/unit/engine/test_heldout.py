"""The loss over a data set: every prediction counted once, at every layout, however many go through at once."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, resolve
from megalite.data.dataset import Spread, WindowDataset, heldout_windows
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.engine.batches import load_microbatches
from megalite.engine.engine import build
from megalite.engine.heldout import held_out
from megalite.engine.stage import Stage, build_stage
from megalite.model.context import Context
from megalite.model.decoder import HEADS, LossHead
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads

MODEL = ModelConfig(vocab_size=101, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, ffn_hidden_size=36)
SEQ = 8
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (4, 2, 1), (1, 1, 2), (2, 2, 3)]  # tp, pp, dp


@pytest.fixture
def windows(tmp_path: Path) -> WindowDataset:
    """30 tokens of two documents: 29 predictions in 4 windows, the last of them not full."""
    stream = np.random.default_rng(0).integers(0, 101, 30).tolist()
    with IndexedWriter(tmp_path / "text", vocab_size=101) as writer:
        writer.add_document(stream[:11])
        writer.add_document(stream[11:])
    return heldout_windows(IndexedDataset(tmp_path / "text"), SEQ)


def config(tp: int = 1, pp: int = 1, dp: int = 1) -> Config:
    train = TrainConfig(dtype="fp64", seq_len=SEQ, micro_batch_size=1, global_batch_size=dp)
    return resolve(Config(MODEL, ParallelConfig(tp=tp, pp=pp, dp=dp, sp=False), train=train), tp * pp * dp)


def by_hand(windows: WindowDataset, chosen: Sequence[int]) -> float:
    """Σ nats from the logits of one window at a time."""
    stage, total = build_stage(config(), SoloWorld()), 0.0
    for number in chosen:
        tokens, labels, mask, positions, _ = windows.batch([number])
        with torch.no_grad():
            logits = stage.logits(torch.from_numpy(tokens), torch.from_numpy(positions), None)
        assert logits is not None
        kept = mask[0] > 0
        total += F.cross_entropy(logits[0][kept], torch.from_numpy(labels)[0][kept], reduction="sum").item()
    return total


@pytest.mark.parametrize("at_once", [1, 3, 32])
@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS)
def test_every_prediction_counts_once(
    tp: int, pp: int, dp: int, at_once: int, windows: WindowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalite.engine.heldout.AT_ONCE", at_once)

    def main(world: World) -> dict[str, float]:
        return held_out(build_stage(config(tp, pp, dp), world), windows, "loss", shows=False)

    expected = by_hand(windows, range(4))
    for sums in run_threads(tp * pp * dp, main):
        assert sums["tokens"] == 29
        assert sums["loss"] == pytest.approx(expected, rel=1e-12)


def test_of_some_samples(windows: WindowDataset) -> None:
    sums = held_out(build_stage(config(), SoloWorld()), Spread(windows, 2), "loss", shows=False)
    assert sums == pytest.approx({"loss": by_hand(windows, [1, 3]), "tokens": 8 + 5}, rel=1e-12)


def test_a_model_of_zeros_has_the_loss_of_a_guess(windows: WindowDataset) -> None:
    stage: Stage = build_stage(config(), SoloWorld(), lambda _, shape: torch.zeros(shape))
    expected = {"loss": 29 * math.log(101), "tokens": 29}
    assert held_out(stage, windows, "loss", shows=False) == pytest.approx(expected, rel=1e-12)


class Counting(LossHead):
    """The head of next tokens, which also counts labels of an even number."""

    sums = ("loss", "even")

    def forward(
        self, hidden: Tensor, context: Context, labels: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Any:
        found = super().forward(hidden, context, labels, loss_mask)
        if labels is None or loss_mask is None:
            return found
        return {**found, "even": ((labels % 2 == 0) * loss_mask).sum()}


@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS)
def test_a_head_that_sums_more(
    tp: int, pp: int, dp: int, windows: WindowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank has its sums by name, and training is what it is without them."""
    monkeypatch.setitem(HEADS, "counting", Counting)

    def main(world: World) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        engines = [build(config(tp, pp, dp), world, head=head) for head in ("counting", "next-token")]
        samples = load_microbatches(windows, range(len(windows)), engines[0].config, engines[0].mesh)
        trained, plain = (engine.forward_backward(samples) for engine in engines)
        for name, gradient in engines[0].grads.main_grad.items():
            assert torch.equal(gradient, engines[1].grads.main_grad[name])
        return held_out(engines[0], windows, "loss", shows=False), trained, plain

    labels = [windows.batch([number]).labels[windows.batch([number]).loss_mask > 0] for number in range(4)]
    even = int(sum((each % 2 == 0).sum() for each in labels))
    found = run_threads(tp * pp * dp, main)
    for held, trained, plain in found:
        assert held == pytest.approx({"loss": by_hand(windows, range(4)), "even": even, "tokens": 29}, rel=1e-12)
        assert plain == {name: value for name, value in trained.items() if name != "even"}
    assert sum(trained["even"] for _, trained, _ in found) == even
