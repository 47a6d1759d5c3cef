"""Rotary position embeddings (RoFormer, arXiv:2104.09864) in the half-split layout of Llama."""

import torch
from torch.autograd.function import once_differentiable

from megalite.ops.kernel import use_fused
from megalite.ops.rope_scaling import RopeScaling

NO_SCALING = RopeScaling()


def rope_cos_sin(
    positions: torch.Tensor,
    rot_dim: int,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    scaling: RopeScaling = NO_SCALING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of cosines and sines for `apply_rope`.

    positions: integers [s], or [b, s] if the sequences of a batch differ.
    rot_dim: how many features of each head are rotated (even).
    theta: base of the frequencies theta^(-2i/rot_dim).
    dtype: of the tables. The arithmetic is always float32, bitwise equal to Hugging Face's Llama. Use float32 for
        float32 and half-precision models, float64 for float64 models.
    scaling: how the frequencies are stretched for long contexts.

    Returns cos and sin, each [s, rot_dim/2] or [b, s, rot_dim/2]. Raises ValueError if rot_dim is odd or not positive.
    """
    if rot_dim <= 0 or rot_dim % 2:
        raise ValueError(f"rot_dim={rot_dim} is not a positive even number")
    angles = positions[..., None].float() * scaling.frequencies(rot_dim, theta, positions.device)
    factor = scaling.attention_factor
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernel: str = "auto") -> torch.Tensor:
    """Rotate the first rot_dim features of every head: (x1, x2) -> (x1·cos - x2·sin, x2·cos + x1·sin).

    x: [b, s, heads, head_dim], or [b, s, groups, heads, head_dim] for a view of the queries in a fused qkv. Any
        strides; x is read without a copy if its last dim is dense.
    cos, sin: [s, rot_dim/2] or [b, s, rot_dim/2]; feature i of x pairs with feature i + rot_dim/2. Features from
        rot_dim on are copied.
    kernel: "auto" (fused if compiled), "fused", or "torch", the reference.

    The arithmetic is in promote(x.dtype, float32); the result is a new contiguous tensor of x's shape and dtype.
    Differentiable once, in x only. Raises ValueError if shapes do not match, or if the kernel is not compiled or does
    not support this dtype.
    """
    _check(x, cos, sin)
    table = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(table), sin.to(table)
    if use_fused("rope", kernel, x):
        return _Rope.apply(x, cos, sin)
    return apply_rope_reference(x, cos, sin)


def apply_rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What `apply_rope` means, in torch ops."""
    half = cos.shape[-1]
    heads = (1,) * (x.dim() - 3)
    cos = cos.reshape(*cos.shape[:-1], *heads, half)
    sin = sin.reshape(*sin.shape[:-1], *heads, half)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)]
    return torch.cat([*rotated, rest], dim=-1)


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    shape, table = list(x.shape), list(cos.shape)
    if x.dim() not in (4, 5):
        raise ValueError(f"apply_rope takes x [b, s, heads, head_dim] or [b, s, groups, heads, head_dim], got {shape}")
    if cos.shape != sin.shape or cos.dim() not in (2, 3) or table[:-1] != shape[:2][-cos.dim() + 1 :]:
        raise ValueError(
            f"apply_rope takes cos and sin [s, rot_dim/2] or [b, s, rot_dim/2] for x {shape}, "
            f"got {table} and {list(sin.shape)}"
        )
    if 2 * table[-1] > shape[-1]:
        raise ValueError(f"rot_dim={2 * table[-1]} (twice the tables' last dim) exceeds head_dim={shape[-1]}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.ops.megalite.rope(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.ops.megalite.rope(grad, cos, sin, True), None, None
