"""Deferred weight gradients of whole models: the same bits as immediate ones, and one accumulation per parameter."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import CheckpointConfig, Config, ModelConfig, ParallelConfig, TrainConfig, TuneConfig, resolve
from megalite.engine.engine import build
from megalite.model.context import Context
from megalite.model.dropout import sample_keys
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

B, S = 2, 8
LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 24,
}
GPT2 = LLAMA | {
    "num_kv_heads": 4,
    "norm": "layernorm",
    "position": "learned",
    "max_positions": S,
    "activation": "gelu_tanh",
    "linear_bias": True,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
MODELS = {"llama": LLAMA, "tied": LLAMA | {"tie_embeddings": True, "qk_norm": True}, "gpt2": GPT2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp1-selective": {"recompute": "selective"},
    "tp1-full": {"recompute": "full", "recompute_layers": 1},
    "tp2": {"tp": 2, "sp": False},
    "tp4-sp-full": {"tp": 4, "recompute": "full"},
}
TUNES: dict[str, dict[str, Any]] = {
    "all": {},
    "lora": {"mode": "lora", "lora_dropout": 0.2},
    "ffn": {"mode": "ffn_only"},
}


def make(model: str, layout: str, tune: str, dtype: str) -> Config:
    parallel = ParallelConfig(**({"tp": 1, "pp": 1, "dp": 1} | LAYOUTS[layout]))
    train = TrainConfig(seq_len=S, micro_batch_size=B, global_batch_size=B, dtype=dtype)
    config = resolve(Config(model=ModelConfig(**MODELS[model]), parallel=parallel, train=train), parallel.tp or 1)
    if not TUNES[tune]:
        return config
    return dataclasses.replace(config, tune=TuneConfig(**TUNES[tune]), checkpoint=CheckpointConfig(load="base"))


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.empty(shape).normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3, generator=generator)


def run(world: World, config: Config, deferring: bool) -> tuple[list[Tensor], dict[str, int], int]:
    """Losses of two microbatches and all gradients; accumulations by name; the jobs of one microbatch."""
    engine = build(config, world, value)
    engine.grads.begin(2)
    calls = dict.fromkeys(engine.grads.main_grad, 0)
    for name in calls:
        engine.parameters[name].register_post_accumulate_grad_hook(
            lambda _, name=name: calls.update({name: calls[name] + 1})
        )
    losses, waiting = [], 0
    for number in range(2):
        tokens = torch.arange(B * S).view(B, S) * 5 % 37 + number
        keys = sample_keys(1, torch.arange(B) + B * number)
        jobs: list | None = [] if deferring else None
        context = Context(torch.arange(S).expand(B, S), keys=keys, deferred=jobs)
        loss = engine.models[0](tokens, context, tokens.flip(1), torch.ones(B, S))["loss"]
        loss.backward()
        losses.append(loss.detach())
        if jobs is not None:
            waiting = len(jobs)
            # nothing that has a job has a gradient yet
            assert waiting + sum(calls.values()) == (number + 1) * len(calls)
            for job in jobs:
                job()
    assert all(bucket.waiting == 0 for bucket in engine.grads.buckets)
    return [*losses, engine.grads.flat.clone()], calls, waiting


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_deferred_weight_gradients_have_the_bits_of_immediate_ones(
    model: str, layout: str, tune: str, dtype: str
) -> None:
    config = make(model, layout, tune, dtype)
    size = config.parallel.tp or 1
    expected = run_threads(size, lambda world: run(world, config, False))
    found = run_threads(size, lambda world: run(world, config, True))
    for (bits, _, _), (bits_here, calls, jobs) in zip(expected, found, strict=True):
        for a, b in zip(bits, bits_here, strict=True):
            assert torch.equal(a, b)
        assert bool(bits[-1].any())
        # once a microbatch, a weight tied to the embedding too: its head is not deferred
        assert set(calls.values()) == {2}
        assert jobs == {"all": 9 - (model == "tied"), "lora": 0, "ffn": 4}[tune]
