"""Grouped-query attention of the plain model, written as if for one device.

GQA: Ainslie et al. 2023; RoPE: Su et al. 2021; sliding window: Beltagy et al. 2020, as in Mistral (Jiang et al. 2023).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite import ops
from megalite.config import ResolvedModel
from megalite.model.context import Context
from megalite.model.dropout import Dropout
from megalite.model.layers import Linear, RMSNorm
from megalite.model.recompute import recomputed


def rope_scaling(c: ResolvedModel) -> ops.RopeScaling:
    """How a model scales its rotary frequencies."""
    return ops.RopeScaling(
        c.rope_scaling,
        factor=c.rope_factor,
        original_max_positions=c.rope_original_max_positions or 0,
        low_freq_factor=c.rope_low_freq_factor,
        high_freq_factor=c.rope_high_freq_factor,
        beta_fast=c.rope_beta_fast,
        beta_slow=c.rope_beta_slow,
        mscale=c.rope_mscale,
        mscale_all_dim=c.rope_mscale_all_dim,
    )


class AttentionCore(nn.Module):
    """softmax(q kᵀ / sqrt(d)) v; it has no parameters.

    q [b, s, heads, d], k and v [b, s, kv, d] -> [b, s, heads, d]. Each query attends to the keys that `context.bounds`
    allows, and of these to the last `window`, its own included; window None: to all of them.
    """

    def __init__(self, kernel: str = "auto", window: int | None = None, dropout: Dropout | None = None) -> None:
        super().__init__()
        self.kernel, self.window = kernel, window
        self.dropout = dropout or Dropout(0.0, site=0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        repeat = q.shape[2] // k.shape[2]
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        visible = self._visible(q.shape[2], k.shape[2], context.bounds, q.device)
        if self.dropout.active:
            # torch's fused attention would draw from a generator
            wide = torch.promote_types(q.dtype, torch.float32)
            scores = (q @ k.transpose(-2, -1)).to(wide) * q.shape[-1] ** -0.5
            hidden = (
                torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
                if visible is None
                else ~visible
            )
            probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype)
            out = self.dropout(probabilities, context) @ v
        elif visible is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        elif self.kernel in ("fused", "torch"):
            scores = q @ k.transpose(-2, -1)
            out = ops.causal_softmax(scores, q.shape[-1] ** -0.5, kernel=self.kernel) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2)

    def _visible(self, queries: int, keys: int, bounds: Tensor | None, device: torch.device) -> Tensor | None:
        """Which keys each query attends to, bool [b or 1, 1, queries, keys]; None: plain causal attention.

        The last query stands at the last key: if there are more keys than queries, the first keys come from a cache.
        """
        if bounds is None and (self.window is None or self.window >= keys):
            return None
        key = torch.arange(keys, device=device)
        query = key[keys - queries :, None]
        if bounds is None:
            visible = (key <= query).unsqueeze(0)
        else:
            visible = (key >= bounds[..., :1]) & (key < bounds[..., 1:])
        if self.window is not None:
            visible = visible & (query - key < self.window)
        return visible.unsqueeze(1)


class Attention(nn.Module):
    """Grouped-query attention, [b, s, h] -> [b, s, h]; rows of `qkv` are [queries, key, value] of each kv group.

    `recompute`: backward runs the core again instead of keeping its activations.
    """

    def __init__(self, c: ResolvedModel, kernel: str, site: int) -> None:
        super().__init__()
        self.head_dim, self.kernel = c.head_dim, kernel
        # query heads of one kv group; the only size a cut may change (replicated kv heads share a group's queries)
        self.queries = c.num_heads // c.num_kv_heads
        width = c.num_heads * c.head_dim
        bias = c.qkv_bias or c.linear_bias
        self.qkv = Linear(c.hidden_size, width + 2 * c.num_kv_heads * c.head_dim, bias=bias)
        self.out = Linear(width, c.hidden_size, bias=c.linear_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.core: nn.Module = AttentionCore(kernel, c.sliding_window, Dropout(c.attention_dropout, site))
        self.recompute = False

    def forward(self, x: Tensor, context: Context) -> Tensor:
        heads = self.qkv(x, context).unflatten(-1, (-1, self.queries + 2, self.head_dim))
        q, k, v = heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q = ops.apply_rope(q, *context.rope, kernel=self.kernel)
            k = ops.apply_rope(k, *context.rope, kernel=self.kernel)
        core = partial(recomputed, self.core) if self.recompute else self.core
        return self.out(core(q.flatten(2, 3), k, v, context).flatten(2), context)
