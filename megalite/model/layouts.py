"""Layouts: parameters as megalite's tensors and as Hugging Face's, of the family that model.family names.

Only names and rows are mapped, so weights, gradients and optimizer moments are treated alike. Shapes: h hidden_size,
f ffn_hidden_size, n query heads of size d in g kv groups, v vocab_size. Linear weights are [out, in] on both sides
(in the blocks of GPT-2 [in, out] there), and both rotate the first half of a head against the second, so no row changes
its place within a head. Llama's names are also those of Mistral, Qwen2, Qwen3 and StableLM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.config import ResolvedModel
from megalite.config.parameters import row_of
from megalite.model.names import is_transposed, names_there


def to_hf(name: str, whole: Tensor, model: ResolvedModel) -> dict[str, Tensor]:
    """Parameter `name` as {Hugging Face name: tensor}; tensors may be views of `whole`.

    attn.qkv [(n + 2g)d, h] becomes q_proj [nd, h], k_proj and v_proj [gd, h]; its bias alike, without h.
    mlp.gate_up [2f, h] becomes gate_proj and up_proj [f, h]. All others keep their shape; to GPT-2 matrices of layers
    are transposed, and attn.qkv becomes c_attn [h, 3nd], all queries, keys and values in turn.
    """
    names = names_there(name, model)
    if row_of(name).cut != "qkv":
        return dict(zip(names, (_transposed(part, name, model) for part in whole.chunk(len(names))), strict=True))
    groups, queries, head_dim = _grouping(model)
    # [g, queries + key + value, d, ...]
    rows = whole.unflatten(0, (groups, queries + 2, head_dim))
    parts = [rows[:, :-2].flatten(0, 2), rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)]
    if len(names) == 1:
        return {names[0]: _transposed(torch.cat(parts), name, model)}
    return {there: part.contiguous() for there, part in zip(names, parts, strict=True)}


def from_hf(get: Callable[[str], Tensor], name: str, model: ResolvedModel) -> Tensor:
    """Parameter `name` out of `get(Hugging Face name)`; the inverse of `to_hf`, shapes as there.

    A tied head is not asked for: its only name is embed.weight.
    """
    parts = [_transposed(get(there), name, model) for there in names_there(name, model)]
    if row_of(name).cut == "qkv":
        groups, queries, head_dim = _grouping(model)
        heads = (queries, 1, 1)
        if len(parts) == 1:
            parts = list(parts[0].split([groups * count * head_dim for count in heads]))
        return torch.cat(
            [part.unflatten(0, (groups, count, head_dim)) for part, count in zip(parts, heads, strict=True)], dim=1
        ).flatten(0, 2)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _transposed(matrix: Tensor, name: str, model: ResolvedModel) -> Tensor:
    """From [out, in] to [in, out] or back, where the two sides differ."""
    return matrix.t().contiguous() if is_transposed(name, model) else matrix


def _grouping(model: ResolvedModel) -> tuple[int, int, int]:
    """kv groups, query heads of each, head size."""
    return model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_dim
