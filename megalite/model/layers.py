"""Norms and feed-forwards of the plain model: they know of no group and no rank.

SwiGLU and GeGLU: Shazeer 2020; LayerNorm: Ba et al. 2016; GELU: Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import ModelConfig

Activation = Callable[[Tensor], Tensor]
GATED: dict[str, Activation] = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": partial(F.gelu, approximate="tanh")}
PLAIN: dict[str, Activation] = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019); statistics in at least fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def make_norm(c: ModelConfig) -> nn.Module:
    """The norm of a residual stream [..., hidden_size]."""
    return nn.LayerNorm(c.hidden_size, c.norm_eps) if c.norm == "layernorm" else RMSNorm(c.hidden_size, c.norm_eps)


def make_mlp(c: ModelConfig) -> nn.Module:
    """The feed-forward [..., hidden_size] -> [..., hidden_size] that `activation` names."""
    return GatedMLP(c) if c.gated else MLP(c)


class GatedMLP(nn.Module):
    """down(act(gate x) * up x), gate and up in one product."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.ffn_hidden_size, bias=c.linear_bias)
        self.down = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=c.linear_bias)
        self.act = GATED[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class MLP(nn.Module):
    """down(act(up x))."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(c.hidden_size, c.ffn_hidden_size, bias=c.linear_bias)
        self.down = nn.Linear(c.ffn_hidden_size, c.hidden_size, bias=c.linear_bias)
        self.act = PLAIN[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))
