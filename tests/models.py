"""The models that tests build: one small enough for every test, and one of real size for arithmetic."""

import dataclasses
from typing import Any

from megalite.config import ModelConfig, ResolvedModel, resolve_model

# odd vocabulary, so that tp pads it; 4 heads over 2 kv heads, so that tp 4 shares kv heads
_TINY = ModelConfig(
    vocab_size=101, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_hidden_size=36
)
TINY = resolve_model(_TINY, 8)
LLAMA_7B = resolve_model(
    ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        ffn_hidden_size=11008,
    ),
    8,
)


def tiny(**changes: Any) -> ResolvedModel:
    """TINY with other values for some keys."""
    # tests take samples of up to 16 tokens
    return resolve_model(dataclasses.replace(_TINY, **changes), 16)
