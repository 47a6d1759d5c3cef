"""Which samples a rank reads: replicas take turns, what fills up the last ones is masked, and no token is unknown."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from models import tiny

from megalite.config import Config, ParallelConfig, Resolved, TrainConfig, resolve
from megalite.config.errors import TrainingError
from megalite.data.dataset import Batch, Layout
from megalite.engine.batches import Microbatch, load_microbatches
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.mesh import Mesh
from megalite.parallel.threads import run_threads

MODEL, SEQ = tiny(num_layers=3), 6


class Numbered:
    """Sample n is token n everywhere, and every token is trained. Notes whose tokens were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def layout(self, indices: Sequence[int]) -> Layout:
        positions = np.tile(np.arange(SEQ), (len(indices), 1))
        return Layout(positions, np.stack([0 * positions, positions + 1], -1))

    def batch(self, indices: Sequence[int]) -> Batch:
        self.read += indices
        tokens = np.tile(np.array(indices)[:, None], (1, SEQ))
        return Batch(tokens, tokens, np.ones((len(indices), SEQ), np.float32), *self.layout(indices))


def config(micro: int = 2, **mesh: int) -> Resolved:
    dp = mesh.get("dp", 1)
    parallel = ParallelConfig(**({"tp": 1, "pp": 1, "dp": 1, "sp": False} | mesh))
    train = TrainConfig(seq_len=SEQ, micro_batch_size=micro, global_batch_size=4 * micro * dp)
    return resolve(Config(MODEL, parallel, train=train), mesh.get("pp", 1) * dp)


def load(c: Resolved, samples: range) -> list[tuple[list[Microbatch], list[int]]]:
    """The microbatches of every rank, and the samples whose tokens it read."""

    def main(world: World) -> tuple[list[Microbatch], list[int]]:
        mesh = Mesh(world, tp=c.parallel.tp, pp=c.parallel.pp, dp=c.parallel.dp)
        data = Numbered()
        return load_microbatches(data, samples, c, mesh), data.read

    return run_threads(c.parallel.pp * c.parallel.dp, main)


def test_samples_are_numbered_as_they_are_consumed() -> None:
    found = load_microbatches(Numbered(), range(40, 48), config(), Mesh(SoloWorld()))
    assert [mb.samples.tolist() for mb in found if mb.samples is not None] == [[40, 41], [42, 43], [44, 45], [46, 47]]
    for mb in found:
        assert mb.samples is not None
        assert mb.bounds is not None
        assert torch.equal(mb.tokens, mb.samples[:, None].expand(-1, SEQ))
        assert mb.bounds.shape == (2, SEQ, 2)


def test_replicas_take_turns() -> None:
    samples = [[mb.samples.tolist() for mb in found] for found, _ in load(config(dp=2), range(8, 16))]
    assert samples == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


@pytest.mark.parametrize(("count", "masked"), [(8, 0), (7, 1), (5, 3), (1, 3), (0, 0)])
def test_what_fills_up_the_last_microbatches_is_masked(count: int, masked: int) -> None:
    """Of 2 replicas, 2 samples a microbatch: each replica gets as many microbatches, and each sample counts once."""
    ranks = [found for found, _ in load(config(dp=2), range(4, 4 + count))]
    assert len(ranks[0]) == len(ranks[1])
    masks = {n: bool(m.any()) for found in ranks for mb in found for n, m in zip(mb.samples.tolist(), mb.loss_mask)}
    assert {n for n, trained in masks.items() if trained} == set(range(4, 4 + count))
    assert sum(not trained for trained in masks.values()) == masked


def test_a_stage_between_the_ends_reads_no_token() -> None:
    first, middle, last = load(config(pp=3), range(8))
    assert first[1] == last[1] == list(range(8))
    assert middle[1] == []
    for there, here in zip(first[0], middle[0], strict=True):
        assert not here.tokens.any()
        assert not here.loss_mask.any()
        assert torch.equal(here.positions, there.positions)
        assert torch.equal(here.bounds, there.bounds)
        assert torch.equal(here.samples, there.samples)


def test_a_token_that_the_model_does_not_have_is_named() -> None:
    """The vocabulary has 101 tokens, and token 100 is its last."""
    mesh = Mesh(SoloWorld())
    assert len(load_microbatches(Numbered(), range(93, 101), config(), mesh)) == 4
    message = r"^sample 100: token 101 is not below model\.vocab_size=101; preprocess the text with the model's own"
    with pytest.raises(TrainingError, match=message):
        load_microbatches(Numbered(), range(94, 102), config(), mesh)
