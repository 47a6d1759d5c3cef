"""Recomputation changes what is kept, and no bit of what is computed."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, check, resolve
from megalite.engine.engine import Engine, Microbatch, build
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads
from megalite.plan.activations import stage_activation_bytes

SMALL = ModelConfig(
    vocab_size=67, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, qk_norm=True
)


def make(model: ModelConfig = SMALL, train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    layout = ParallelConfig(**({"tp": 1, "pp": 1, "dp": 1} | parallel))
    sizes = {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 8}
    config = Config(model=model, parallel=layout, train=TrainConfig(**(sizes | (train or {}))))
    ranks = layout.tp * layout.pp
    config = resolve(config, ranks)
    check(config, ranks)
    return config


def batches(config: Config, count: int) -> list[Microbatch]:
    b, s = config.train.micro_batch_size, config.train.seq_len
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.model.vocab_size, (count, b, s + 1), generator=generator)
    positions = torch.arange(s).expand(b, s)
    return [Microbatch(t[:, :-1], t[:, 1:], torch.ones(b, s), positions) for t in tokens]


def results(config: Config) -> list[tuple]:
    """Of every rank: the loss, all gradients as one tensor, and an evaluation's loss."""

    def main(world: World) -> tuple:
        engine = build(config, world)
        loss, _ = engine.forward_backward(batches(config, 4))
        return loss, engine.grads.flat.clone(), engine.evaluate(batches(config, 4))[0]

    return run_threads(config.parallel.tp * config.parallel.pp, main)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "sp": False}], ids=str)
def test_every_bit_is_the_same(layout: dict[str, Any], kernels: str) -> None:
    expected = results(make(train={"kernels": kernels}, **layout))
    assert any(loss > 0 for loss, _, _ in expected)
    for kind, layers in (("selective", 0), ("full", 0), ("full", 1)):
        found = results(make(train={"kernels": kernels}, recompute=kind, recompute_layers=layers, **layout))
        for (loss, grads, evaluated), (loss_here, grads_here, evaluated_here) in zip(expected, found, strict=True):
            assert (loss, evaluated) == (loss_here, evaluated_here)
            assert torch.equal(grads, grads_here)


def peak_bytes(engine: Engine, microbatches: list[Microbatch]) -> int:
    """The most bytes allocated at a time by one forward and backward, beyond what was there before it."""
    engine.forward_backward(microbatches)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine.forward_backward(microbatches)
    total = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


BIG = dataclasses.replace(SMALL, num_layers=8, hidden_size=64, ffn_hidden_size=176, vocab_size=64)


def test_peak_bytes_fall_as_planned() -> None:
    peaks, planned = {}, {}
    for kind, layers in (("none", 0), ("selective", 0), ("full", 4), ("full", 0)):
        config = make(
            BIG,
            {"seq_len": 128, "kernels": "torch", "global_batch_size": 2},
            recompute=kind,
            recompute_layers=layers,
        )
        peaks[kind, layers] = peak_bytes(build(config, SoloWorld()), batches(config, 1))
        planned[kind, layers] = stage_activation_bytes(config, 8, 1)
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for key, bytes_planned in planned.items():
        # the peak holds passing tensors too: what one step of backward makes
        assert 0.6 < bytes_planned / peaks[key] < 1.1, (key, planned, peaks)
    assert peaks["full", 0] < peaks["none", 0] / 3
