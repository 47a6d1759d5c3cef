"""Layouts: megalite's parameters beside those of Hugging Face's Llama and its relatives, and of GPT-2.

A map of names and rows and nothing else, so weights, gradients and optimizer moments go through it alike. Shapes: h
hidden_size, f ffn_hidden_size, n query heads of size d in g kv groups, v vocab_size. Linear weights are [out, in] on
both sides (GPT-2's layers: [in, out] there), and both rotate the first half of a head against the second, so no row
changes its place within a head. Learned positions mean GPT-2's names, all else Llama's (Mistral, Qwen2, Qwen3,
StableLM: the same names).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.model.names import QKV, grouping, is_turned, names_there
from megalite.model.names import global_names as global_names
from megalite.model.names import hf_names as hf_names


def to_hf(name: str, whole: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """Parameter `name` as {Hugging Face name: tensor}; tensors may be views of `whole`.

    attn.qkv [(n + 2g)d, h] becomes q_proj [nd, h], k_proj and v_proj [gd, h]; its bias alike, without h.
    mlp.gate_up [2f, h] becomes gate_proj and up_proj [f, h]. All others keep their shape; to GPT-2 matrices of layers
    are transposed, and attn.qkv becomes c_attn [h, 3nd], all queries, keys and values in turn.
    """
    names = names_there(name, model)
    if f".{QKV}." not in name:
        return dict(zip(names, (_turned(part, name, model) for part in whole.chunk(len(names))), strict=True))
    groups, queries, head_dim = grouping(model)
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
    parts = [_turned(get(there), name, model) for there in names_there(name, model)]
    if f".{QKV}." in name:
        groups, queries, head_dim = grouping(model)
        heads = (queries, 1, 1)
        if len(parts) == 1:
            parts = list(parts[0].split([groups * count * head_dim for count in heads]))
        return torch.cat(
            [part.unflatten(0, (groups, count, head_dim)) for part, count in zip(parts, heads, strict=True)], dim=1
        ).flatten(0, 2)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _turned(matrix: Tensor, name: str, model: ModelConfig) -> Tensor:
    """From [out, in] to [in, out] or back, where the two sides differ."""
    return matrix.t().contiguous() if is_turned(name, matrix.dim(), model) else matrix
