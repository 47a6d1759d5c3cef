"""Linears split over the tp ranks. Only these modules and those of vocab.py communicate within a group.

A linear is three products: the forward's, the input gradient's, and the weight gradient's, which a schedule may defer
(`linear`; Qi et al. 2023, "Zero Bubble Pipeline Parallelism"). The engine uses it at every tp, one included.

Column-parallel and row-parallel linears after Shoeybi et al. 2019 (Megatron-LM, section 3); sequence parallelism after
Korthikanti et al. 2022, section 4.2.2: where tp alone would all-reduce, the residual stream is sharded along the
sequence, and the all-reduce splits into a reduce-scatter before and an all-gather after. Shapes: [b, s, h] batch,
sequence, features; under sequence parallelism outside of the linears [b, s/tp, h].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.profiler import record_function

from megalite.parallel.groups import Done, Group, Pending

Job = Callable[[], None]
ALONE = Group([0], 0)


class LinearContext(Protocol):
    """What a linear reads of a forward pass's context; `deferred`: see megalite/model/context.py."""

    @property
    def deferred(self) -> list[Job] | None: ...


def _start_gather_sequence(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    return group.start_all_gather(x.contiguous())


def _join_sequence(parts: Tensor) -> Tensor:
    """[tp, b, s/tp, h] -> [b, s, h]."""
    return parts.movedim(0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])


def _gather_sequence(x: Tensor, group: Group) -> Tensor:
    """This rank's [b, s/tp, h] -> [b, s, h]."""
    return _join_sequence(group.all_gather(x.contiguous()))


def _start_scatter_sequence(x: Tensor, group: Group) -> tuple[Tensor, Pending]:
    """Begin summing [b, s, h] over the group; the result is this rank's [b, s/tp, h]."""
    b, s = x.shape[:2]
    return group.start_reduce_scatter(
        x.reshape(b, group.size, s // group.size, *x.shape[2:]).movedim(1, 0).contiguous()
    )


def _start_reduce_input(grad_x: Tensor, group: Group, sp: bool) -> tuple[Tensor, Pending]:
    """Begin summing the input gradients of all ranks' columns: [b, s, h], or this rank's [b, s/tp, h] under sp."""
    return _start_scatter_sequence(grad_x, group) if sp else (grad_x, group.start_all_reduce(grad_x))


def _input_gradient(grad_out: Tensor, weight: Tensor) -> Tensor:
    return (grad_out.flatten(0, -2) @ weight).view(*grad_out.shape[:-1], -1)


def _weight_gradient(grad_out: Tensor, x: Tensor) -> Tensor:
    with record_function("weight gradient"):
        return grad_out.flatten(0, -2).t() @ x.flatten(0, -2)


def _accumulate(weight: Tensor, x: Tensor, grad_out: Tensor, group: Group, sp: bool) -> None:
    """A deferred weight gradient, which reaches `weight` and its hooks the way it does in any backward pass."""
    grad = _weight_gradient(grad_out, _gather_sequence(x, group) if sp else x)
    torch.autograd.backward((get_gradient_edge(weight),), (grad,))


class _Linear(torch.autograd.Function):
    """y = gather(x) Wᵀ + b. The input gradient's reduction travels while the weight gradient is computed.

    With `later` = (jobs, parameter) the weight gradient becomes a job, which keeps the input and the output gradient
    and nothing else. Under sp a column-parallel linear keeps its part of the sequence and the job gathers the input
    again, as the immediate backward does; a row-parallel one keeps its output gradient as it was gathered for the input
    gradient. So deferring adds no traffic.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor | None,
        group: Group,
        sp: bool,
        later: tuple[list[Job], Tensor] | None,
    ) -> Tensor:
        # the gradient of a frozen weight is not computed, so its input is not kept
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or later else None, weight)
        ctx.group, ctx.sp, ctx.later = group, sp, later
        return F.linear(_gather_sequence(x, group) if sp else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
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
            grad_x = _input_gradient(grad_out, weight)
        if again:
            gathered.wait()
            x = _join_sequence(parts)
        if grad_x is not None:
            with record_function("start reducing input gradient"):
                grad_x, reduced = _start_reduce_input(grad_x, group, ctx.sp)
        if needs_weight:
            grad_weight = _weight_gradient(grad_out, x)
        elif ctx.later is not None:
            jobs, parameter = ctx.later
            # detached, or the job would keep the graph that made the input
            jobs.append(partial(_accumulate, parameter, x.detach(), grad_out, group, ctx.sp))
        if needs_bias:
            grad_bias = grad_out.flatten(0, -2).sum(0)
        reduced.wait()
        return grad_x, grad_weight, grad_bias, None, None, None, None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sp: bool, deferred: list[Job] | None
) -> Tensor:
    """gather(x) Wᵀ + b for a `weight` [out/tp, in] whose rows are cut over `group`: [b, s, in] -> [b, s, out/tp].

    Under sp x is this rank's [b, s/tp, in]. In a group of one it is a linear of any x [..., in], bit for bit torch's.
    `deferred`: see megalite/model/context.py.
    """
    if deferred is not None and weight.requires_grad:
        # The graph must not reach the parameter: its hooks would run without a gradient. So that there is a graph even
        # where x needs no gradient, an empty tensor is its other end.
        anchor = torch.empty(0, requires_grad=True)
        out: Tensor = _Linear.apply(x, weight.detach(), bias, anchor, group, sp, (deferred, weight))
        return out
    if group.size == 1:
        # the same products, but recomputation can skip the last one: it stops once every tensor that backward needs is
        # there, and torch saves the input of its own linear before the product, that of a Function after it
        return F.linear(x, weight, bias)
    out = _Linear.apply(x, weight, bias, None, group, sp, None)
    return out


class ColumnLinear(nn.Module):
    """Linear whose output features are cut: [b, s, in] -> [b, s, out/tp] (input [b, s/tp, in] under sp)."""

    def __init__(self, linear: nn.Linear, group: Group, sp: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.sp = group, sp

    def forward(self, x: Tensor, context: LinearContext) -> Tensor:
        return linear(x, self.weight, self.bias, self.group, self.sp, context.deferred)


class _ColumnInput(torch.autograd.Function):
    """The whole input of a column-parallel linear on every rank; backward sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sp: bool) -> Tensor:
        ctx.group, ctx.sp = group, sp
        return _gather_sequence(x, group) if sp else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_x = grads[0].clone(memory_format=torch.contiguous_format)
        grad_x, reduced = _start_reduce_input(grad_x, ctx.group, ctx.sp)
        reduced.wait()
        return grad_x, None, None


def column_input(x: Tensor, group: Group, sp: bool) -> Tensor:
    """x [b, s, in], or this rank's [b, s/tp, in] under sp -> [b, s, in], the input of this rank's columns."""
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
        return _gather_sequence(grads[0], ctx.group), None


def sum_over(x: Tensor, group: Group, sp: bool) -> Tensor:
    """The sum over the group of [b, s, h]: all of it, or under sp this rank's [b, s/tp, h]."""
    out: Tensor = _ReduceScatter.apply(x, group) if sp else _Reduce.apply(x, group)
    return out


class RowLinear(nn.Module):
    """Linear whose input features are cut: [b, s, in/tp] -> [b, s, out] (output [b, s/tp, out] under sp)."""

    def __init__(self, linear: nn.Linear, group: Group, sp: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.group, self.sp = group, sp

    def product(self, x: Tensor, context: LinearContext) -> Tensor:
        """This rank's summand [b, s, out]: its input needs no gathering, so it is the linear of a group of one."""
        return linear(x, self.weight, None, ALONE, False, context.deferred)

    def reduced(self, summand: Tensor) -> Tensor:
        """The sum over the group, and the bias."""
        out = sum_over(summand, self.group, self.sp)
        return out if self.bias is None else out + self.bias

    def forward(self, x: Tensor, context: LinearContext) -> Tensor:
        if self.group.size == 1:
            return linear(x, self.weight, self.bias, self.group, False, context.deferred)
        return self.reduced(self.product(x, context))
