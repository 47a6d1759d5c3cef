"""Parameters and FLOPs, against a real model on meta and published sizes."""

import dataclasses
from typing import Any

import pytest
import torch
from models import LLAMA_7B, tiny

from megalite.config import (
    parse_command_line,
    resolve,
    resolve_model,
)
from megalite.model.decoder import Decoder
from megalite.plan.counts import layer_flops, layer_parameters, parameters, training_flops

SMALL = tiny(num_layers=3, ffn_hidden_size=20, num_kv_heads=None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("kv", "head_dim"), [(4, 6), (2, 6), (1, 10)])
def test_parameters_are_those_of_the_model(tied: bool, qkv_bias: bool, qk_norm: bool, kv: int, head_dim: int) -> None:
    options = {"tie_embeddings": tied, "qkv_bias": qkv_bias, "qk_norm": qk_norm, "num_kv_heads": kv}
    model = resolve_model(dataclasses.replace(SMALL, head_dim=head_dim, **options), 8)
    with torch.device("meta"):
        decoder = Decoder(model, range(3))
    assert parameters(model) == sum(p.numel() for p in decoder.parameters())
    assert layer_parameters(model) == sum(p.numel() for p in decoder.layers["0"].parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layernorm"},
        {"activation": "gelu"},
        {"linear_bias": True},
        {"linear_bias": True, "activation": "gelu_tanh", "qkv_bias": True},
        {"position": "learned", "max_positions": 13, "tie_embeddings": True},
    ],
    ids=str,
)
def test_parameters_of_options_are_those_of_the_model(options: dict[str, Any]) -> None:
    model = tiny(num_layers=3, ffn_hidden_size=20, **options)
    with torch.device("meta"):
        decoder = Decoder(model, range(3))
    assert parameters(model) == sum(p.numel() for p in decoder.parameters())
    assert layer_parameters(model) == sum(p.numel() for p in decoder.layers["0"].parameters())


def test_a_window_saves_the_scores_it_hides() -> None:
    model = resolve_model(SMALL, 64)
    full, whole = layer_flops(model, 64), layer_flops(dataclasses.replace(model, sliding_window=64), 64)
    assert full == whole
    windowed = layer_flops(dataclasses.replace(model, sliding_window=8), 64)
    assert full - windowed == pytest.approx(4 * 24 * (32 - (8 - 0.5)))


def test_known_sizes() -> None:
    assert parameters(LLAMA_7B) == 6_738_415_616  # Touvron et al. 2023; as Hugging Face counts it
    # 6 FLOPs per parameter and token, the embedding not multiplied, plus attention's 6 s h a layer, halved by causality
    weights = parameters(LLAMA_7B) - 32000 * 4096 - 65 * 4096
    attention = 32 * 6 * 2048 * 4096
    assert training_flops(LLAMA_7B, 2048) == pytest.approx(6 * weights + attention, rel=1e-12)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("sft-7b", 6_738_415_616),
    ],
)
def test_presets_are_the_published_models(preset: str, count: int) -> None:
    config = parse_command_line(["--preset", preset], default_preset=None, prog="").config
    assert parameters(resolve(config, 1).model) == count
