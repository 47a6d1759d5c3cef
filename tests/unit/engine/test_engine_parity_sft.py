"""Packed rows, padded rows, every topology and microbatch size: one loss and one gradient, in float64."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from models import tiny
from torch import Tensor

from megalite.config import Config, ParallelConfig, TrainConfig, check, resolve
from megalite.data.indexed import IndexedWriter
from megalite.data.instructions import weights_prefix
from megalite.data.packing import Conversations, SftDataset
from megalite.engine.batches import load_microbatches
from megalite.engine.engine import build
from megalite.parallel.cuts import Shard
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

VOCAB, SEQ, SAMPLES, TOLERANCE = 50, 16, 24, 1e-12


@dataclass(frozen=True)
class Case:
    packing: bool = True
    micro: int = 2
    tp: int = 1
    pp: int = 1
    dp: int = 1
    schedule: str = "1f1b"
    model: str = "rope"

    def __str__(self) -> str:
        words = f"{'packed' if self.packing else 'padded'}-mb{self.micro}-tp{self.tp}-pp{self.pp}-dp{self.dp}"
        return f"{words}-{self.schedule}-{self.model}"

    def config(self) -> Config:
        model = tiny(
            vocab_size=VOCAB,
            num_layers=4,
            position="learned" if self.model == "learned" else "rope",
            sliding_window=3 if self.model == "window" else None,
            init_std=0.2,
        )
        kernels = "torch" if self.model == "torch" else "auto"
        parallel = ParallelConfig(tp=self.tp, pp=self.pp, dp=self.dp, schedule=self.schedule)
        train = TrainConfig(
            dtype="fp64", seq_len=SEQ, micro_batch_size=self.micro, global_batch_size=SAMPLES, kernels=kernels
        )
        ranks = self.tp * self.pp * self.dp
        config = resolve(Config(model=model, parallel=parallel, train=train), ranks)
        check(config, ranks)
        return config


@functools.cache
def conversations() -> Conversations:
    """20 of them, with weights 0, 0.5 and 1; some have few trained tokens, some many, one is cut."""
    random = np.random.default_rng(0)
    prefix = Path(tempfile.mkdtemp(prefix="parity-sft-")) / "chats"
    with IndexedWriter(prefix, VOCAB) as tokens, IndexedWriter(weights_prefix(prefix), dtype="uint8") as weights:
        for i in range(20):
            length = 30 if i == 7 else int(random.integers(2, SEQ + 2))
            tokens.add_document(random.integers(VOCAB, size=length))
            weights.add_document(random.choice(3, size=length, p=[0.6, 0.1, 0.3]))
        tokens.sidecar = {"weights": [0.0, 0.5, 1.0]}
    return Conversations(prefix)


@dataclass(frozen=True)
class Rank:
    loss: float
    tokens: float
    shards: dict[str, Shard]
    held: dict[str, range]
    grads: dict[str, Tensor]
    masked: int


def play(case: Case) -> list[Rank]:
    """One global batch of SAMPLES rows: those behind the last conversation are wholly masked."""
    config, data = case.config(), conversations()
    dataset = SftDataset(data, np.arange(len(data.lengths)), SEQ, packing=case.packing)
    assert len(dataset) < SAMPLES

    def main(world: World) -> Rank:
        engine = build(config, world)
        microbatches = load_microbatches(dataset, range(SAMPLES), config, engine.mesh)
        sums = engine.forward_backward(microbatches)
        held = {name: engine.grads.held(name) for name in engine.parameters}
        ends = engine.mesh.is_first_stage or engine.mesh.is_last_stage
        if not ends:  # it has read no token
            assert not any(mb.tokens.any() for mb in microbatches)
        masked = sum(not mb.loss_mask.any() for mb in microbatches)
        return Rank(sums["loss"], sums["tokens"], engine.shards, held, engine.grads.reduced, masked)

    return run_threads(case.tp * case.pp * case.dp, main)


@functools.cache
def reference(model: str) -> Rank:
    """One conversation a row, one row a microbatch, one rank, and attention that is causal and nothing else."""
    (rank,) = play(Case(packing=False, micro=1, model=model))
    return rank


CASES = [
    *(Case(micro=micro) for micro in (1, 2, 4)),
    *(Case(packing=False, micro=micro) for micro in (2, 4)),
    Case(dp=2),
    Case(dp=2, micro=4),
    Case(tp=2, pp=2),
    Case(tp=2, pp=2, micro=4, schedule="gpipe"),
    Case(tp=2, pp=2, dp=2, micro=1),
    Case(packing=False, tp=2, pp=2),
    Case(pp=4, micro=1),
    Case(model="learned"),
    Case(model="learned", tp=2, pp=2),
    Case(model="window"),
    Case(model="torch"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_numbers_are_those_of_one_conversation_a_row(case: Case) -> None:
    expected, ranks = reference(case.model), play(case)
    assert sum(rank.tokens for rank in ranks) == expected.tokens > 50
    loss = sum(rank.loss for rank in ranks)
    assert abs(loss - expected.loss) <= TOLERANCE * expected.loss
    errors: dict[str, float] = {}
    for rank in ranks:
        for name, grad in rank.grads.items():
            whole, held = expected.grads[name], rank.held[name]
            whole = whole.view(expected.shards[name].whole_shape)
            local = rank.shards[name].cut(whole).flatten()[held.start : held.stop]
            error = (grad.flatten() - local).abs().max().item() / whole.abs().max().item()
            errors[name] = max(errors.get(name, 0.0), error)
    assert errors.keys() == expected.grads.keys()
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}
    if case.micro < 4 or case.packing:
        assert all(rank.masked for rank in ranks)  # some microbatch has nothing to learn


def test_rows_that_see_each_other_have_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: with bounds left out it does."""
    layout = SftDataset.layout
    monkeypatch.setattr(SftDataset, "layout", lambda self, indices: layout(self, indices)._replace(bounds=None))
    (rank,) = play(Case())
    assert abs(rank.loss - reference("rope").loss) > 1e-3 * rank.loss
