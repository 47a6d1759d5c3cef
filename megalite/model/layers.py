"""Linears, norms and feed-forwards of the plain model, written as if for one device.

SwiGLU and GeGLU: Shazeer 2020; LayerNorm: Ba et al. 2016; GELU: Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import ResolvedModel
from megalite.model.context import Context

Activation = Callable[[Tensor], Tensor]
GATED: dict[str, Activation] = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": partial(F.gelu, approximate="tanh")}
PLAIN: dict[str, Activation] = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class Linear(nn.Linear):
    """x Wᵀ + b, [..., in] -> [..., out]. What replaces it may need the context: an adapter drops by its keys."""

    def forward(self, x: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019); statistics in at least fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def make_norm(c: ResolvedModel) -> nn.Module:
    """The norm of a residual stream [..., hidden_size]."""
    return nn.LayerNorm(c.hidden_size, c.norm_eps) if c.norm == "layernorm" else RMSNorm(c.hidden_size, c.norm_eps)


def make_mlp(c: ResolvedModel) -> nn.Module:
    """The feed-forward [..., hidden_size] -> [..., hidden_size] that `activation` names."""
    return GatedMLP(c) if c.gated else MLP(c)


class GatedMLP(nn.Module):
    """down(act(gate x) * up x), gate and up in one product."""

    def __init__(self, c: ResolvedModel) -> None:
        super().__init__()
        self.gate_up = Linear(c.hidden_size, 2 * c.ffn_hidden_size, bias=c.linear_bias)
        self.down = Linear(c.ffn_hidden_size, c.hidden_size, bias=c.linear_bias)
        self.act = GATED[c.activation]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate, up = self.gate_up(x, context).chunk(2, dim=-1)
        return self.down(self.act(gate) * up, context)


class MLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, c: ResolvedModel) -> None:
        super().__init__()
        self.up = Linear(c.hidden_size, c.ffn_hidden_size, bias=c.linear_bias)
        self.down = Linear(c.ffn_hidden_size, c.hidden_size, bias=c.linear_bias)
        self.act = PLAIN[c.activation]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(self.act(self.up(x, context)), context)
