"""Linears, norms and feed-forwards against their formulas, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from models import tiny
from torch import Tensor, nn

from megalite.model.context import Context
from megalite.model.layers import GATED, MLP, PLAIN, GatedMLP, Linear, RMSNorm, make_mlp, make_norm

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
FORMULAS |= {"geglu": FORMULAS["gelu"], "geglu_tanh": FORMULAS["gelu_tanh"]}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    return module


def context(x: Tensor) -> Context:
    return Context(torch.arange(x.shape[1]).expand(x.shape[:2]))


@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool, x: Tensor) -> None:
    linear = randomised(Linear(24, 7, bias=bias).double())
    expected = torch.einsum("bsi,oi->bso", x, linear.weight) + (linear.bias if bias else 0)
    torch.testing.assert_close(linear(x, context(x)), expected, rtol=1e-12, atol=1e-12)


def test_rms_norm(x: Tensor) -> None:
    norm = randomised(RMSNorm(24, 1e-3).double())
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert bool((RMSNorm(24, 1e-3).weight == 1).all())


def test_rms_norm_of_half_precision_has_statistics_in_fp32() -> None:
    """4096 squares of 16: their sum, 1,048,576, is more than fp16 holds."""
    x = torch.full((1, 4096), 16.0, dtype=torch.float16)
    assert RMSNorm(4096, 1e-6).half()(x).unique().tolist() == [1.0]


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_the_norm_that_the_model_names(kind: str, x: Tensor) -> None:
    norm = make_norm(tiny(norm=kind, norm_eps=1e-3))
    assert isinstance(norm, nn.LayerNorm if kind == "layernorm" else RMSNorm)
    assert norm.eps == 1e-3
    assert norm.double()(x).shape == x.shape


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [*GATED, *PLAIN])
def test_feed_forward(activation: str, bias: bool, x: Tensor) -> None:
    mlp = randomised(make_mlp(tiny(activation=activation, linear_bias=bias)).double())
    w = dict(mlp.named_parameters())

    def linear(y: Tensor, name: str) -> Tensor:
        return y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=y.dtype))

    if activation in GATED:
        assert isinstance(mlp, GatedMLP)
        both = linear(x, "gate_up")
        y = FORMULAS[activation](both[..., :36]) * both[..., 36:]
    else:
        assert isinstance(mlp, MLP)
        y = FORMULAS[activation](linear(x, "up"))
    torch.testing.assert_close(mlp(x, context(x)), linear(y, "down"), rtol=1e-12, atol=1e-12)
