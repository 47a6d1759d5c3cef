"""Dropout is a function of where an element stands: the same at every topology, and random to any statistic."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, check, resolve
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.model import dropout
from megalite.model.context import Context
from megalite.model.dropout import Dropout, keep_mask, sample_keys
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads

SEQ, GLOBAL_BATCH = 8, 8
MODEL = ModelConfig(
    vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_hidden_size=24, tie_embeddings=True
)
DROPS = dataclasses.replace(MODEL, dropout=0.2, attention_dropout=0.3)
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "microbatches-of-1": {"micro_batch_size": 1},
    "dp2": {"dp": 2},
    "tp2": {"tp": 2, "sp": False},
    "tp2-sp-pp2": {"tp": 2, "pp": 2},
    "tp4-sp-gpipe": {"tp": 4, "pp": 2, "schedule": "gpipe"},
    "recomputed": {"pp": 2, "recompute": "full", "micro_batch_size": 4},
    "core-recomputed": {"tp": 2, "recompute": "selective"},
}


def make(model: ModelConfig = DROPS, micro_batch_size: int = 2, **parallel: Any) -> Config:
    layout = ParallelConfig(**({"tp": 1, "pp": 1, "dp": 1} | parallel))
    train = TrainConfig(seq_len=SEQ, micro_batch_size=micro_batch_size, global_batch_size=GLOBAL_BATCH)
    config = Config(model=model, parallel=layout, train=train)
    ranks = layout.tp * layout.pp * layout.dp
    config = resolve(config, ranks)
    check(config, ranks)
    return config


def batches(engine: Engine, first: int) -> list[Microbatch]:
    """This replica's microbatches of the samples from `first` on; a sample's tokens follow from its number."""
    size, dp = engine.config.train.micro_batch_size, engine.mesh.dp
    found = []
    for start in range(first + dp.rank * size, first + GLOBAL_BATCH, size * dp.size):
        samples = torch.arange(start, start + size)
        tokens = (samples.unsqueeze(1) * 5 + torch.arange(SEQ + 1) * 3) % 37
        positions = torch.arange(SEQ).expand(size, SEQ)
        found.append(Microbatch(tokens[:, :-1], tokens[:, 1:], torch.ones(size, SEQ), positions, samples=samples))
    return found


Masks = dict[tuple[int, int, int], list]


def recorded(config: Config, monkeypatch: pytest.MonkeyPatch) -> Masks:
    """{(site, key of the sample, row): mask} of one step of all ranks; ranks that share a row must agree on it."""
    masks: Masks = {}

    def record(keys: Tensor, site: int, shape: torch.Size, p: float, first_row: int = 0) -> Tensor:
        kept = keep_mask(keys, site, shape, p, first_row)
        for key, sample in zip(keys.tolist(), kept):
            for row, mask in enumerate(sample.tolist(), first_row):
                assert masks.setdefault((site, key, row), mask) == mask
        return kept

    monkeypatch.setattr(dropout, "keep_mask", record)

    def main(world: World) -> None:
        engine = build(config, world)
        engine.forward_backward(batches(engine, 0))

    p = config.parallel
    run_threads(p.tp * p.pp * p.dp, main)
    monkeypatch.undo()
    return masks


@pytest.mark.parametrize("layout", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_masks_are_the_same_at_every_topology(layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = recorded(make(), monkeypatch)
    # the embedding and two branches by position, the probabilities by head
    assert len(expected) == GLOBAL_BATCH * (SEQ + 2 * (2 * SEQ + 4))
    assert recorded(make(**layout), monkeypatch) == expected


def losses(config: Config) -> list[float]:
    """Of a few steps of gradient descent, the sum of all ranks' losses."""

    def main(world: World) -> list[float]:
        engine, found = build(config, world), []
        for step in range(10):
            found.append(engine.forward_backward(batches(engine, step * GLOBAL_BATCH))["loss"])
            with torch.no_grad():
                for name, parameter in engine.parameters.items():
                    parameter -= 1.0 / (GLOBAL_BATCH * SEQ) * engine.grads.main_grad[name]
        return found

    p = config.parallel
    return [sum(step) for step in zip(*run_threads(p.tp * p.pp * p.dp, main), strict=True)]


def test_loss_curves_are_the_same_at_every_topology() -> None:
    expected = losses(make())
    assert expected[-1] < 0.97 * expected[0]
    assert expected != losses(make(MODEL))
    for name, layout in TOPOLOGIES.items():
        assert losses(make(**layout)) == pytest.approx(expected, rel=1e-5), name


def test_evaluation_drops_nothing() -> None:
    plain, drops = build(make(MODEL), SoloWorld()), build(make(), SoloWorld())
    samples = batches(plain, 0)
    assert drops.evaluate(samples) == plain.evaluate(samples)
    assert drops.forward_backward(samples) != plain.forward_backward(samples)
    assert drops.evaluate(samples) == plain.evaluate(samples)


def test_without_dropout_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recorded(make(MODEL), monkeypatch) == {}


def far(count: int, share: float, p: float) -> bool:
    """Whether a share of `count` draws lies further from p than five standard deviations."""
    return abs(share - p) > 5 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_random(p: float) -> None:
    keys = sample_keys(1234, torch.arange(16))
    kept = keep_mask(keys, 3, (16, 64, 128), p).double()
    assert not far(kept.numel(), kept.mean().item(), 1 - p)
    for dims in ((0, 1), (0, 2), (1, 2)):  # of each channel, position and sample
        rates = kept.mean(dims)
        assert not any(far(kept.numel() // rates.numel(), rate, 1 - p) for rate in rates.tolist())
    # neighbours in each direction, sites, seeds: of two independent masks both keep (1 - p)²
    others = {
        "sample": (kept[1:], kept[:-1]),
        "position": (kept[:, 1:], kept[:, :-1]),
        "channel": (kept[..., 1:], kept[..., :-1]),
        "site": (kept, keep_mask(keys, 4, (16, 64, 128), p)),
        "seed": (kept, keep_mask(sample_keys(1235, torch.arange(16)), 3, (16, 64, 128), p)),
        "transposed": (kept[:, :, :64], kept[:, :, :64].transpose(1, 2)),
    }
    for name, (a, b) in others.items():
        both = a * b
        if name == "transposed":
            both = both[:, torch.ones(64, 64).triu(1).bool()]
        assert not far(both.numel(), both.mean().item(), (1 - p) ** 2), name


def test_a_part_has_the_bits_of_the_whole() -> None:
    keys = sample_keys(7, torch.tensor([5, 2**40]))
    whole = keep_mask(keys, 2, (2, 12, 3, 5), 0.4)
    for first in (0, 4, 8):
        assert torch.equal(keep_mask(keys, 2, (2, 4, 3, 5), 0.4, first), whole[:, first : first + 4])


def splitmix(key: int, index: int) -> int:
    """Steele et al. 2014, figure 17, on Python's integers: the state moves on by the golden gamma, and is mixed."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64() -> None:
    """A change of these bits would change every run that goes on from a checkpoint."""
    keys = sample_keys(7, torch.tensor([0, 5, 2**40]))
    expected = [splitmix(splitmix(0, 7), n) for n in (0, 5, 2**40)]
    assert [key % 2**64 for key in keys.tolist()] == expected
    kept = keep_mask(keys, 2, (3, 4, 6), 0.4, first_row=8)
    for i, key in enumerate(expected):
        for row in range(4):
            for channel in range(6):
                x = splitmix(splitmix(splitmix(key, 2), 8 + row), channel)
                assert kept[i, row, channel].item() == (x >= 0.4 * 2**64)


def test_expectation_and_gradient() -> None:
    module, keys = Dropout(0.25, site=1), sample_keys(0, torch.arange(64))
    x = torch.ones(64, 32, 32, dtype=torch.float64, requires_grad=True)
    out = module(x, Context(torch.arange(32).expand(64, -1), keys=keys))
    assert sorted(out.unique().tolist()) == [0, 1 / 0.75]
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())
    assert module.eval()(x, Context(torch.arange(32).expand(64, -1))) is x
