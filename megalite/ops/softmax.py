"""Scale, causal mask and softmax of attention scores in one pass (fused softmax of Megatron-LM, arXiv:1909.08053)."""

import torch
from torch.autograd.function import once_differentiable

from megalite.ops.kernel import use_fused


def causal_softmax(scores: torch.Tensor, scale: float, kernel: str = "auto") -> torch.Tensor:
    """softmax(mask(scale · scores)) over the last dim, in scores' dtype.

    scores: [b, heads, s_q, s_k], any strides, s_k >= s_q. The last query sees every key, query i the first
        i + 1 + s_k - s_q; if s_k > s_q, the first keys are those of a cache.
    scale: usually 1/sqrt(head_dim).
    kernel: "auto" (fused if compiled), "fused", or "torch", the reference.

    Masked keys get exactly 0, and so does every key of a row whose visible scores are all -inf (no NaN). Sums are taken
    in promote(dtype, float32). The result is a new contiguous tensor; differentiable once. Raises ValueError if the
    shape is wrong, or if the kernel is not compiled or does not support this dtype.
    """
    if scores.dim() != 4 or scores.shape[3] < scores.shape[2]:
        raise ValueError(f"causal_softmax takes scores [b, heads, s_q, s_k] with s_k >= s_q, got {list(scores.shape)}")
    if use_fused("causal_softmax", kernel, scores):
        return _CausalSoftmax.apply(scores, scale)
    return causal_softmax_reference(scores, scale)


def causal_softmax_reference(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition of `causal_softmax`, in torch ops."""
    s_q, s_k = scores.shape[-2:]
    hidden = torch.ones(s_q, s_k, dtype=torch.bool, device=scores.device).triu(1 + s_k - s_q)
    x = (scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale).masked_fill(hidden, -torch.inf)
    # softmax of a row of -inf is NaN, and so is its gradient: such rows are set to 0 before and after
    empty = (x == -torch.inf).all(-1, keepdim=True)
    return x.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0).to(scores.dtype)


class _CausalSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: torch.Tensor, scale: float) -> torch.Tensor:
        probs = torch.ops.megalite.causal_softmax(scores, scale)
        ctx.save_for_backward(probs)
        ctx.scale = scale
        return probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (probs,) = ctx.saved_tensors
        return torch.ops.megalite.causal_softmax_backward(grad, probs, ctx.scale), None
