"""Names and layouts: megalite's parameters beside those of Hugging Face's Llama, Qwen2 and Qwen3.

A map of names and rows and nothing else, so weights, gradients and optimizer moments go through it alike. Shapes: h
hidden_size, f ffn_hidden_size, n query heads of size d in g kv groups, v vocab_size. Linear weights are [out, in] on
both sides, and both rotate the first half of a head against the second, so no row changes its place within a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.config import ModelConfig

_ENDS = {
    "embed.weight": "model.embed_tokens.weight",
    "loss_head.norm.weight": "model.norm.weight",
    "loss_head.head.weight": "lm_head.weight",
}
# module within a layer -> the modules there whose rows it holds
_QKV, _GATE_UP = "attn.qkv", "mlp.gate_up"
_LAYER = {
    "attn_norm": ("input_layernorm",),
    _QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    _GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


def global_names(model: ModelConfig) -> list[str]:
    """megalite's name of every parameter of the whole model; a tied head has none of its own."""
    layer = [f"{module}.weight" for module in _LAYER if model.qk_norm or module not in ("attn.q_norm", "attn.k_norm")]
    if model.qkv_bias:
        layer.append(f"{_QKV}.bias")
    ends = [name for name in _ENDS if not (model.tie_embeddings and name == "loss_head.head.weight")]
    return [ends[0], *(f"layers.{i}.{name}" for i in range(model.num_layers) for name in layer), *ends[1:]]


def hf_names(model: ModelConfig) -> list[str]:
    """Hugging Face's name of every parameter of the whole model; `lm_head.weight` is left out where it is tied."""
    return [there for name in global_names(model) for there in _names(name)]


def to_hf(name: str, whole: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """Parameter `name` as {Hugging Face name: tensor}; tensors may be views of `whole`.

    attn.qkv [(n + 2g)d, h] becomes q_proj [nd, h], k_proj and v_proj [gd, h]; its bias alike, without h.
    mlp.gate_up [2f, h] becomes gate_proj and up_proj [f, h]. All others keep their shape.
    """
    names = _names(name)
    if len(names) == 3:
        groups, queries, head_dim = _grouping(model)
        # [g, queries + key + value, d, ...]
        rows = whole.unflatten(0, (groups, queries + 2, head_dim))
        parts = [rows[:, :-2].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)]
        return {there: part.contiguous() for there, part in zip(names, parts, strict=True)}
    return dict(zip(names, whole.chunk(len(names)), strict=True))


def from_hf(get: Callable[[str], Tensor], name: str, model: ModelConfig) -> Tensor:
    """Parameter `name` out of `get(Hugging Face name)`; the inverse of `to_hf`, shapes as there.

    A tied head is not asked for: its only name is embed.weight.
    """
    parts = [get(there) for there in _names(name)]
    if len(parts) == 3:
        groups, queries, head_dim = _grouping(model)
        heads = (queries, 1, 1)
        return torch.cat(
            [part.unflatten(0, (groups, count, head_dim)) for part, count in zip(parts, heads, strict=True)], dim=1
        ).flatten(0, 2)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _names(name: str) -> list[str]:
    if name in _ENDS:
        return [_ENDS[name]]
    layers, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    module, _, leaf = rest.rpartition(".")
    if layers != "layers" or not number.isdigit() or module not in _LAYER or leaf not in ("weight", "bias"):
        raise ValueError(f"{name!r} has no counterpart in Hugging Face's Llama, Qwen2 or Qwen3")
    return [f"model.layers.{number}.{there}.{leaf}" for there in _LAYER[module]]


def _grouping(model: ModelConfig) -> tuple[int, int, int]:
    """kv groups, query heads of each, head size."""
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    return model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_dim
