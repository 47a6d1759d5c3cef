"""Recomputation changes what is kept, and no bit of what is computed."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from megalite.config import (
    CheckpointConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
    check,
    resolve,
)
from megalite.config.shapes import shapes
from megalite.engine import stage as stage_module
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.model.attention import AttentionCore
from megalite.model.context import Context
from megalite.model.decoder import Block, Decoder
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads
from megalite.plan.activations import recompute_bytes, stage_activation_bytes

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
        sums = engine.forward_backward(batches(config, 4))
        return sums["loss"], engine.grads.flat.clone(), engine.evaluate(batches(config, 4))["loss"]

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


LORA = {"mode": "lora", "lora_rank": 2, "lora_dropout": 0.3}
LAYOUTS = [{}, {"tp": 2, "sp": True}, {"tp": 2, "pp": 2, "sp": False}]


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_recompute_cuts_and_adapters_compose_in_either_order(
    layout: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping = dataclasses.replace(SMALL, dropout=0.1, attention_dropout=0.1)
    config = make(dropping, recompute=kind, recompute_layers=1, **layout)
    config = dataclasses.replace(config, tune=TuneConfig(**LORA), checkpoint=CheckpointConfig(load="base"))
    plain = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, recompute="none"))
    generator = torch.Generator().manual_seed(1)
    values = {
        name: torch.empty(shape).normal_(0.0, 0.2, generator=generator)
        for name, shape in (shapes(config.model) | config.shapes.factors).items()
    }

    def main(world: World, c: Config) -> tuple[float, Tensor]:
        engine = build(c, world, lambda name, _: values[name])
        numbered = [dataclasses.replace(mb, samples=torch.arange(2) + 2 * i) for i, mb in enumerate(batches(config, 4))]
        return engine.forward_backward(numbered)["loss"], engine.grads.flat.clone()

    def run(c: Config) -> list[tuple[float, Tensor]]:
        return run_threads(c.parallel.tp * c.parallel.pp, lambda world: main(world, c))

    expected, usual = run(plain), run(config)
    assert all(bool(grad.any()) for _, grad in expected)
    set_recompute, cut_model = Decoder.set_recompute, stage_module.cut_model

    def recompute_first(decoder: Decoder, *args: Any) -> None:
        set_recompute(decoder, kind, 1)
        cut_model(decoder, *args)

    # build cuts, adapts and sets recomputation; here it is set before all else and not again
    monkeypatch.setattr(stage_module, "cut_model", recompute_first)
    monkeypatch.setattr(Decoder, "set_recompute", lambda *_: None)
    for found in (usual, run(config)):
        for (loss, grad), (loss_here, grad_here) in zip(expected, found, strict=True):
            assert loss == loss_here
            assert torch.equal(grad, grad_here)


def test_a_core_replaced_later_is_recomputed_too() -> None:
    """A setting of the attention, not of the core that it had: another core takes its place."""
    decoder = Decoder(make().model, range(2))
    decoder.set_recompute("selective", 1)
    runs = [0, 0]

    def counted(core: nn.Module, layer: int) -> nn.Module:
        core.register_forward_pre_hook(lambda *_: runs.__setitem__(layer, runs[layer] + 1))
        return core

    for number, block in enumerate(decoder.layers.values()):
        assert isinstance(block, Block)
        block.attn.core = counted(AttentionCore("torch"), number)
    tokens = torch.arange(16).view(2, 8)
    loss = decoder(tokens, Context(torch.arange(8).expand(2, 8)), tokens, torch.ones(2, 8))["loss"]
    loss.backward()
    assert runs == [2, 1]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute=some is not supported; use none, selective, full"):
        Decoder(make().model, range(2)).set_recompute("some", 0)


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
        planned[kind, layers] = stage_activation_bytes(config, 8) + recompute_bytes(config)
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for key, bytes_planned in planned.items():
        # the peak holds passing tensors too: what one step of backward makes
        assert 0.6 < bytes_planned / peaks[key] < 1.1, (key, planned, peaks)
    assert peaks["full", 0] < peaks["none", 0] / 3
