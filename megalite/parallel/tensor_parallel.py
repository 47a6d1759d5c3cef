"""Linears, embedding and cross entropy split over the tp ranks: the only modules that know of a group.

Column-parallel and row-parallel linears after Shoeybi et al. 2019 (Megatron-LM, section 3); sequence parallelism after
Korthikanti et al. 2022, section 4.2.2: where tp alone would all-reduce, the residual stream is sharded along the
sequence, and the all-reduce splits into a reduce-scatter before and an all-gather after. Shapes: [b, s, h] batch,
sequence, features; under sequence parallelism outside of the linears [b, s/tp, h].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from megalite.parallel.cuts import Shard
from megalite.parallel.groups import Done, Group, Pending


class LinearContext(Protocol):
    """What a linear reads of a forward pass's context; `deferred`: see megalite/model/context.py."""

    @property
    def deferred(self) -> list[Callable[[], None]] | None: ...


def _start_gather_sequence(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    return group.start_all_gather(x.contiguous())


def _join_sequence(parts: Tensor) -> Tensor:
    """[tp, b, s/tp, h] -> [b, s, h]."""
    return parts.movedim(0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])


def _start_scatter_sequence(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """Begin summing [b, s, h] over the group; the result is this rank's [b, s/tp, h]."""
    b, s = x.shape[:2]
    return group.start_reduce_scatter(
        x.reshape(b, group.size, s // group.size, *x.shape[2:]).movedim(1, 0).contiguous()
    )


def _start_reduce_input(grad_x: Tensor, group: Group, sp: bool) -> tuple[Tensor, Pending]:
    """Begin summing what each rank's columns give for the input: [b, s, h], or this rank's [b, s/tp, h] under sp."""
    return _start_scatter_sequence(grad_x, group) if sp else (grad_x, group.start_all_reduce(grad_x))


class _ColumnLinear(torch.autograd.Function):
    """y = gather(x) Wᵀ + b. The input gradient's reduction travels while the weight gradient is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sp: bool) -> Tensor:
        # a frozen weight does not ask what went in
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.sp = group, sp
        return F.linear(_join_sequence(group.all_gather(x.contiguous())) if sp else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad_out,) = grads
        x, weight = ctx.saved_tensors
        group: Group = ctx.group
        grad_x: Tensor | None = None
        grad_weight = grad_bias = None
        reduced: Pending = Done()
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        again = ctx.sp and needs_weight
        if again:
            # only the shard was kept; the whole input travels again, under the input gradient's product
            parts, gathered = _start_gather_sequence(x, group)
        if needs_x:
            grad_x = grad_out @ weight
        if again:
            gathered.wait()
            x = _join_sequence(parts)
        if grad_x is not None:
            with record_function("start reducing input gradient"):
                grad_x, reduced = _start_reduce_input(grad_x, group, ctx.sp)
        grad_rows = grad_out.flatten(0, -2)
        if needs_weight:
            with record_function("weight gradient"):
                grad_weight = grad_rows.t() @ x.flatten(0, -2)
        if needs_bias:
            grad_bias = grad_rows.sum(0)
        reduced.wait()
        return grad_x, grad_weight, grad_bias, None, None


class ColumnLinear(nn.Module):
    """Linear whose output features are cut: [b, s, in] -> [b, s, out/tp] (input [b, s/tp, in] under sp)."""

    def __init__(self, linear: nn.Linear, group: Group, sp: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.sp = group, sp

    def forward(self, x: Tensor, context: LinearContext) -> Tensor:
        out: Tensor = _ColumnLinear.apply(x, self.weight, self.bias, self.group, self.sp)
        return out


class _ColumnInput(torch.autograd.Function):
    """What goes into a column-parallel linear, whole on every rank; backward sums what each rank makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sp: bool) -> Tensor:
        ctx.group, ctx.sp = group, sp
        return _join_sequence(group.all_gather(x.contiguous())) if sp else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_x = grads[0].clone(memory_format=torch.contiguous_format)
        grad_x, reduced = _start_reduce_input(grad_x, ctx.group, ctx.sp)
        reduced.wait()
        return grad_x, None, None


def column_input(x: Tensor, group: Group, sp: bool) -> Tensor:
    """x [b, s, in] (or this rank's [b, s/tp, in] under sp), as [b, s, in] for each rank to make its columns of."""
    out: Tensor = _ColumnInput.apply(x, group, sp)
    return out


class _Reduce(torch.autograd.Function):
    """Sum over the group forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ReduceScatter(torch.autograd.Function):
    """Sum over the group and keep this rank's part of the sequence; backward gathers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out, pending = _start_scatter_sequence(x, group)
        pending.wait()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _join_sequence(ctx.group.all_gather(grads[0].contiguous())), None


def _sum_over(x: Tensor, group: Group, sp: bool) -> Tensor:
    out: Tensor = _ReduceScatter.apply(x, group) if sp else _Reduce.apply(x, group)
    return out


class RowLinear(nn.Module):
    """Linear whose input features are cut: [b, s, in/tp] -> [b, s, out] (output [b, s/tp, out] under sp)."""

    def __init__(self, linear: nn.Linear, group: Group, sp: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.sp = group, sp

    def product(self, x: Tensor, context: LinearContext) -> Tensor:
        """This rank's summand [b, s, out]."""
        return F.linear(x, self.weight)

    def forward(self, x: Tensor, context: LinearContext) -> Tensor:
        out = _sum_over(self.product(x, context), self.group, self.sp)
        return out if self.bias is None else out + self.bias


class VocabEmbedding(nn.Module):
    """Embedding whose vocabulary rows are cut: tokens [b, s] -> [b, s, h] (or [b, s/tp, h] under sp)."""

    def __init__(self, embedding: nn.Embedding, group: Group, sp: bool, shard: Shard) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.group, self.sp = group, sp
        self.first = shard.pieces[0].start if shard.pieces else 0
        self.count = shard.pieces[0].length if shard.pieces else 0

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= self.count)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return _sum_over(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group, self.sp)


class SequenceEmbedding(nn.Module):
    """An uncut embedding of this rank's part of the sequence: indices [b, s] -> [b, s/tp, h]."""

    def __init__(self, embedding: nn.Embedding, group: Group) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.group = group

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices.chunk(self.group.size, 1)[self.group.rank], self.weight)


class _VocabCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] with the vocabulary cut over the group; the logits are never gathered nor changed.

    `uniform`: what of each label goes to every token of the true vocabulary; `share`: what of it stays.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: Group, first: int, count: int, share: float, uniform: float
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        shifted = logits.to(wide, copy=True)
        shifted[..., count:] = -torch.inf
        shifted -= group.all_reduce(shifted.amax(-1), "max").unsqueeze(-1)
        local = labels - first
        elsewhere = (local < 0) | (local >= count)
        local = local.masked_fill(elsewhere, 0)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        if uniform:
            target = share * target + uniform * shifted[..., :count].sum(-1)
        exp = shifted.exp_()
        both = group.all_reduce(torch.stack([target, exp.sum(-1)]))
        ctx.save_for_backward(exp.div_(both[1].unsqueeze(-1)), local, elsewhere)
        ctx.dtype, ctx.count, ctx.share, ctx.uniform = logits.dtype, count, share, uniform
        return both[1].log() - both[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (grad_out,) = grads
        probabilities, local, elsewhere = ctx.saved_tensors
        grad = probabilities * grad_out.unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), -ctx.share * grad_out.masked_fill(elsewhere, 0.0).unsqueeze(-1))
        if ctx.uniform:
            grad[..., : ctx.count] -= ctx.uniform * grad_out.unsqueeze(-1)
        return grad.to(ctx.dtype), None, None, None, None, None, None


class VocabCrossEntropy(nn.Module):
    """Cross entropy on logits [b, s, vocab/tp] of a cut head; gives Σ mask · ce, the same on every tp rank.

    `label_smoothing` as in the plain model's: over the true vocabulary, in training.
    """

    def __init__(self, group: Group, shard: Shard, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.group, self.vocab_size, self.label_smoothing = group, shard.whole_shape[0], label_smoothing
        self.first = shard.pieces[0].start if shard.pieces else 0
        self.count = shard.pieces[0].length if shard.pieces else 0

    def forward(self, logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        ce: Tensor = _VocabCrossEntropy.apply(
            logits, labels, self.group, self.first, self.count, 1 - smoothing, smoothing / self.vocab_size
        )
        return (ce * loss_mask).sum()

    def whole(self, logits: Tensor) -> Tensor:
        """[b, s, vocab/tp] -> [b, s, vocab], padding dropped."""
        return self.group.all_gather(logits.contiguous()).movedim(0, -2).flatten(-2)[..., : self.vocab_size]
