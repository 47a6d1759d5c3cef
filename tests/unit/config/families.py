"""A model of every family, and with every option that adds or drops a parameter."""

from collections.abc import Mapping
from typing import Any

import torch
from models import tiny

from megalite.config import ResolvedModel
from megalite.model.decoder import Decoder

GPT2 = {"position": "learned", "max_positions": 13, "norm": "layernorm", "activation": "gelu_tanh", "linear_bias": True}
MODELS: Mapping[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"linear_bias": True},
    "llama, tied": {"tie_embeddings": True},
    "llama, one kv head": {"num_kv_heads": 1},
    "mistral": {"sliding_window": 5},
    "qwen2": {"qkv_bias": True},
    "qwen2, tied": {"qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 10},
    "stablelm": {"norm": "layernorm", "qkv_bias": True, "rope_fraction": 0.3334},
    "geglu": {"activation": "geglu_tanh", "tie_embeddings": True, "head_dim": 8},
    "gpt2": {**GPT2, "num_kv_heads": 4, "tie_embeddings": True},
    "gpt2, untied": {**GPT2, "num_kv_heads": 4},
    "learned positions with a gate": {"position": "learned", "max_positions": 13},
    "no gate": {"activation": "gelu"},
}


def model_of(name: str) -> ResolvedModel:
    return tiny(num_layers=3, ffn_hidden_size=40, **MODELS[name])


def decoder_of(m: ResolvedModel) -> Decoder:
    with torch.device("meta"):
        return Decoder(m, range(m.num_layers))
