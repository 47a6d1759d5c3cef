"""A number that is not finite is named by rank, tensor and samples; a spike of the loss is told once."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, check, resolve
from megalite.data.dataset import PretrainDataset, heldout_windows
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.instructions import weights_prefix
from megalite.data.packing import Conversations, SftDataset
from megalite.engine.batches import load_microbatches
from megalite.engine.engine import Engine, build
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads
from megalite.run.divergence import Spikes, advice, locate

MODEL = ModelConfig(vocab_size=64, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=24)
Poison = Callable[[Engine], None]


@pytest.fixture
def dataset(tmp_path: Path) -> PretrainDataset:
    with IndexedWriter(tmp_path / "text", 64) as writer:
        for document in range(50):
            writer.add_document([(document + i) % 64 for i in range(16)])
    return PretrainDataset(IndexedDataset(tmp_path / "text"), 8, seed=1, shuffle=False)


def config(**mesh: int) -> Config:
    ranks = math.prod(mesh.get(axis, 1) for axis in ("tp", "pp", "dp"))
    parallel = ParallelConfig(**{"tp": 1, "pp": 1, "dp": 1, "bucket_mb": 0.001, **mesh})
    found = resolve(
        Config(MODEL, parallel, train=TrainConfig(seq_len=8, micro_batch_size=2, global_batch_size=8)), ranks
    )
    check(found, ranks)
    return found


def located(c: Config, dataset: PretrainDataset, poison: Callable[[Engine, int], None]) -> list[str]:
    """What every rank says of a step for which `poison(engine, rank)` was called before."""

    def main(world: World) -> str:
        engine = build(c, world)
        poison(engine, world.rank)
        microbatches = load_microbatches(dataset, range(8, 16), c, engine.mesh)
        loss = engine.forward_backward(microbatches)["loss"]
        losses = engine.mesh.world.all_reduce(torch.tensor([loss], dtype=torch.float64))
        return locate(engine, microbatches, dataset, bool(losses.isfinite().all()))

    p = c.parallel
    return run_threads((p.tp or 1) * (p.pp or 1) * (p.dp or 1), main)


@pytest.mark.parametrize(
    ("mesh", "rank", "where"),
    [
        ({}, 0, "rank 0"),
        ({"dp": 2}, 1, "rank 1 (dp 1)"),
        ({"dp": 2, "zero": 1}, 1, "rank 1 (dp 1)"),
        ({"tp": 2, "pp": 2}, 3, "rank 3 (pp 1, tp 1)"),
        ({"tp": 2, "pp": 2, "dp": 2}, 2, "rank 2 (pp 0, dp 1, tp 0)"),
    ],
    ids=str,
)
def test_a_weight(dataset: PretrainDataset, mesh: dict[str, int], rank: int, where: str) -> None:
    def poison(engine: Engine, here: int) -> None:
        if here == rank:
            layer = next(name for name in engine.parameters if name.endswith("mlp.down.weight"))
            engine.parameters[layer].data.view(-1)[3] = math.nan

    layer = 2 if rank == 3 else 0
    found = located(config(**mesh), dataset, poison)
    assert set(found) == {f"the weight layers.{layer}.mlp.down.weight on {where}"}


class Poisoned(torch.nn.Module):
    """Gives what the module gives, with one element spoiled in one of the forwards."""

    def __init__(self, module: torch.nn.Module, forward: int, value: float) -> None:
        super().__init__()
        self.module, self.left, self.value, self.every = module, forward, value, 4

    def forward(self, *inputs: Any) -> torch.Tensor:
        out = self.module(*inputs)
        if self.left == 0:
            out = out.clone()
            out.view(-1)[0] = self.value
        self.left = (self.left - 1) % self.every
        return out


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("mesh", "rank", "forward", "where"),
    [
        ({}, 0, 2, "rank 0, of samples 12 to 13 (documents 6, 7)"),
        ({"dp": 2}, 1, 1, "rank 1 (dp 1), of samples 14 to 15 (documents 7, 8)"),
        ({"dp": 2, "zero": 1}, 0, 0, "rank 0 (dp 0), of samples 8 to 9 (documents 4, 5)"),
        ({"pp": 2}, 0, 1, "rank 0 (pp 0), of samples 10 to 11 (documents 5, 6)"),
        ({"pp": 2}, 1, 1, "rank 1 (pp 1), of samples 10 to 11 (documents 5, 6)"),
    ],
    ids=str,
)
def test_an_activation(
    dataset: PretrainDataset, mesh: dict[str, int], rank: int, forward: int, where: str, value: float
) -> None:
    c = config(**mesh)

    def poison(engine: Engine, here: int) -> None:
        if here == rank:
            block = list(engine.models[engine.mesh.pp.rank].layers.values())[1]
            block.mlp.down = Poisoned(block.mlp.down, forward, value)
            block.mlp.down.every = 4 // (c.parallel.dp or 1)

    layer = 3 if rank == 1 and "pp" in mesh else 1
    assert set(located(c, dataset, poison)) == {f"the output of layers.{layer}.mlp.down on {where}"}


@pytest.mark.parametrize(
    ("mesh", "rank", "where"),
    [
        ({}, 0, "rank 0"),
        ({"tp": 2}, 1, "rank 1 (tp 1)"),
        ({"pp": 2, "dp": 2, "zero": 1}, 2, "rank 2 (pp 1, dp 0)"),
    ],
    ids=str,
)
def test_a_gradient_of_a_finite_loss(dataset: PretrainDataset, mesh: dict[str, int], rank: int, where: str) -> None:
    c = config(**mesh)
    layer = 2 if "pp" in mesh else 0

    def poison(engine: Engine, here: int) -> None:
        if here != rank:
            return
        forward_backward = engine.forward_backward

        def spoiled(*args: Any) -> dict[str, float]:
            result = forward_backward(*args)
            for gradients in (engine.grads.main_grad, engine.grads.reduced):
                gradients[f"layers.{layer}.attn.out.weight"].view(-1)[:2] = math.nan
            return result

        engine.forward_backward = spoiled  # type: ignore[method-assign]

    assert set(located(c, dataset, poison)) == {f"the gradient of layers.{layer}.attn.out.weight on {where}"}


def test_a_loss_that_a_second_forward_does_not_show_again(dataset: PretrainDataset) -> None:
    c = config(dp=2)

    def poison(engine: Engine, here: int) -> None:
        if here == 1:
            head = Poisoned(engine.models[engine.mesh.pp.rank].loss_head.cross_entropy, 1, math.nan)
            head.every = 10**9
            engine.models[engine.mesh.pp.rank].loss_head.cross_entropy = head

    (found,) = set(located(c, dataset, poison))
    assert found == "the loss on rank 1 (dp 1), of samples 14 to 15 (documents 7, 8)"


def test_where_samples_lie(tmp_path: Path, dataset: PretrainDataset) -> None:
    # a window predicts a token of the next one
    assert dataset.describe([0]) == "document 0"
    assert dataset.describe([1]) == "documents 0, 1"
    windows = heldout_windows(dataset.indexed, 100)
    assert windows.describe([0]) == "documents 0, 1, 2, 3, 4, 5, 6"
    assert windows.describe([0, 1]) == "documents 0, 1, 2, 3, 4, 5, 6, 7, ..."

    prefix = tmp_path / "chats"
    with IndexedWriter(prefix, 64) as tokens, IndexedWriter(weights_prefix(prefix), 64) as weights:
        for length in (7, 3, 9, 4, 30):
            tokens.add_document(range(length))
            weights.add_document([1] * length)
        tokens.sidecar = {"weights": [0.0, 1.0]}
    sft = SftDataset(Conversations(prefix), np.array([0, 1, 3, 4]), 9, overlong="truncate_left")
    assert [sft.describe([row]) for row in range(len(sft))] == [
        "conversation 4",
        "conversations 0, 3",
        "conversation 1",
    ]


def test_the_batch_is_passed_over_beside_others(dataset: PretrainDataset) -> None:
    c = config()
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, path="data/corpus_text_document"))
    assert advice(c, range(8, 12), dataset) == (
        "the batch was samples 8 to 11 of corpus_text_document (documents 4, 5, 6), and a resumed run meets it again: "
        "train.skip_samples=8:12 passes over it"
    )
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, skip_samples="32:64"))
    assert "train.skip_samples=32:64,8:12 passes" in advice(c, range(8, 12), dataset)


def test_a_spike_is_told_once_and_not_before_there_is_a_usual() -> None:
    spikes = Spikes()

    def told(losses: list[float]) -> list[float]:
        found = []
        for loss in losses:
            ratio = spikes.ratio(loss)
            found += [ratio] if spikes.begins(ratio) else []
        return found

    assert told([10.0, 2000.0, *[3.0] * 20]) == []
    assert told([2.5, 4.0, 9.0, 3000.0, 2800.0, 3.1]) == [1000.0]
    assert told([30.0] * 40) == [10.0]
    assert told([120.1, 0.0]) == [pytest.approx(4.0, rel=1e-2)]
