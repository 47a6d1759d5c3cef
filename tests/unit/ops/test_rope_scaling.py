"""Scaled rotary frequencies: bitwise those of transformers, and what each kind keeps and slows down."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megalite.ops import RopeScaling

CPU = torch.device("cpu")
CASES: list[tuple[RopeScaling, dict[str, Any]]] = [
    (RopeScaling("linear", 3.0), {"rope_type": "linear", "factor": 3.0}),
    (
        RopeScaling("llama3", 8.0, 8192),
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    (
        RopeScaling("yarn", 4.0, 4096),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ),
    (
        RopeScaling("yarn", 40.0, 4096, beta_fast=24.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.5),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
        | {"beta_fast": 24.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5},
    ),
]


@pytest.mark.parametrize(("scaling", "parameters"), CASES, ids=lambda v: getattr(v, "kind", ""))
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 10_000.0), (128, 500_000.0)])
def test_frequencies_are_those_of_transformers(
    scaling: RopeScaling, parameters: dict[str, Any], head_dim: int, theta: float
) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU)
    assert torch.equal(scaling.frequencies(head_dim, theta, CPU), expected)
    assert scaling.attention_factor == attention_factor


def test_without_scaling() -> None:
    frequencies = RopeScaling().frequencies(8, 10_000.0, CPU)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    assert RopeScaling().attention_factor == 1.0


@pytest.mark.parametrize("scaling", [RopeScaling("llama3", 8.0, 512), RopeScaling("yarn", 8.0, 512)])
def test_fast_frequencies_are_kept_and_slow_ones_divided(scaling: RopeScaling) -> None:
    plain, scaled = (s.frequencies(128, 500_000.0, CPU) for s in (RopeScaling(), scaling))
    share = scaled / plain
    torch.testing.assert_close(share[0], torch.tensor(1.0))
    torch.testing.assert_close(share[-1], torch.tensor(1 / 8))
    assert bool((share[1:] <= share[:-1] + 1e-6).all())  # and in between it only falls
    assert len(share.unique()) > 3
