"""Names and layouts: megalite's parameters beside those of Hugging Face's Llama and its relatives, and of GPT-2.

A map of names and rows and nothing else, so weights, gradients and optimizer moments go through it alike. Shapes: h
hidden_size, f ffn_hidden_size, n query heads of size d in g kv groups, v vocab_size. Linear weights are [out, in] on
both sides (GPT-2's layers: [in, out] there), and both rotate the first half of a head against the second, so no row
changes its place within a head. Learned positions mean GPT-2's names, all else Llama's (Mistral, Qwen2, Qwen3,
StableLM: the same names).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.config.tune import shapes

# module -> the modules there whose rows it holds, joined; of a layer, within its layer
_QKV, _GATE_UP = "attn.qkv", "mlp.gate_up"
_LLAMA = {
    "embed": ("model.embed_tokens",),
    "loss_head.norm": ("model.norm",),
    "loss_head.head": ("lm_head",),
    "layers": ("model.layers",),
    "attn_norm": ("input_layernorm",),
    _QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    _GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
}
# GPT-2 keeps query, key and value in one matrix, and all matrices of its layers as [in, out]
_GPT2 = {
    "embed": ("transformer.wte",),
    "pos_embed": ("transformer.wpe",),
    "loss_head.norm": ("transformer.ln_f",),
    "loss_head.head": ("lm_head",),
    "layers": ("transformer.h",),
    "attn_norm": ("ln_1",),
    _QKV: ("attn.c_attn",),
    "attn.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}


def global_names(model: ModelConfig) -> list[str]:
    """megalite's name of every parameter of the whole model; a tied head has none of its own."""
    return list(shapes(model))


def hf_names(model: ModelConfig) -> list[str]:
    """Hugging Face's name of every parameter of the whole model; `lm_head.weight` is left out where it is tied."""
    return [there for name in global_names(model) for there in _names(name, model)]


def to_hf(name: str, whole: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """Parameter `name` as {Hugging Face name: tensor}; tensors may be views of `whole`.

    attn.qkv [(n + 2g)d, h] becomes q_proj [nd, h], k_proj and v_proj [gd, h]; its bias alike, without h.
    mlp.gate_up [2f, h] becomes gate_proj and up_proj [f, h]. All others keep their shape; to GPT-2 matrices of layers
    are transposed, and attn.qkv becomes c_attn [h, 3nd], all queries, keys and values in turn.
    """
    names = _names(name, model)
    if f".{_QKV}." not in name:
        return dict(zip(names, (_turned(part, name, model) for part in whole.chunk(len(names))), strict=True))
    groups, queries, head_dim = _grouping(model)
    # [g, queries + key + value, d, ...]
    rows = whole.unflatten(0, (groups, queries + 2, head_dim))
    parts = [rows[:, :-2].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)]
    if len(names) == 1:
        return {names[0]: _turned(torch.cat(parts), name, model)}
    return {there: part.contiguous() for there, part in zip(names, parts, strict=True)}


def from_hf(get: Callable[[str], Tensor], name: str, model: ModelConfig) -> Tensor:
    """Parameter `name` out of `get(Hugging Face name)`; the inverse of `to_hf`, shapes as there.

    A tied head is not asked for: its only name is embed.weight.
    """
    parts = [_turned(get(there), name, model) for there in _names(name, model)]
    if f".{_QKV}." in name:
        groups, queries, head_dim = _grouping(model)
        heads = (queries, 1, 1)
        if len(parts) == 1:
            parts = list(parts[0].split([groups * count * head_dim for count in heads]))
        return torch.cat(
            [part.unflatten(0, (groups, count, head_dim)) for part, count in zip(parts, heads, strict=True)], dim=1
        ).flatten(0, 2)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _names(name: str, model: ModelConfig) -> list[str]:
    table = _GPT2 if model.position == "learned" else _LLAMA
    module, _, leaf = name.rpartition(".")
    prefix = ""
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        prefix, module = f"{table['layers'][0]}.{layer[1]}.", layer[2]
    if module not in table or module == "layers" or leaf not in ("weight", "bias"):
        raise ValueError(f"{name!r} has no counterpart in Hugging Face's Llama, Qwen2, Qwen3 or GPT-2")
    return [f"{prefix}{there}.{leaf}" for there in table[module]]


def _turned(matrix: Tensor, name: str, model: ModelConfig) -> Tensor:
    """From [out, in] to [in, out] or back, where the two sides differ."""
    turn = model.position == "learned" and name.startswith("layers.") and matrix.dim() == 2
    return matrix.t().contiguous() if turn else matrix


def _grouping(model: ModelConfig) -> tuple[int, int, int]:
    """kv groups, query heads of each, head size."""
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    return model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_dim
