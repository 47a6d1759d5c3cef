"""Cut linears against torch's own, forward and gradients, immediate and deferred."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.model.context import Context
from megalite.parallel.cuts import even
from megalite.parallel.groups import Group
from megalite.parallel.tensor_parallel import ColumnLinear, Job, RowLinear, _Linear
from megalite.parallel.threads import run_threads

B, S, H = 2, 12, 6
CONTEXT = Context(torch.arange(S).expand(B, -1))
TP = pytest.mark.parametrize("tp", [2, 3, 4])
SP = pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])


def on_tp(size: int, main: Callable[[Group], object]) -> list:
    return run_threads(size, lambda world: main(world.split([list(range(size))])))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)
    return module


def rows(x: Tensor, group: Group, sp: bool) -> Tensor:
    """This rank's part of a sequence under sp, else all of it."""
    return x.chunk(group.size, 1)[group.rank] if sp else x


@TP
@SP
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_column_then_row(tp: int, sp: bool, bias: bool) -> None:
    """A feed-forward: column, a nonlinearity, row. A bias of the row linear is added once, not tp times."""
    x, wide, out = randn(B, S, H), 12, randn(B, S, H, seed=9)
    weights = {"up": randn(wide, H, seed=1), "down": randn(H, wide, seed=2)}
    if bias:
        weights |= {"up_bias": randn(wide, seed=3), "down_bias": randn(H, seed=4)}
    whole = {name: w.clone().requires_grad_() for name, w in weights.items()} | {"x": x.clone().requires_grad_()}
    hidden = F.linear(whole["x"], whole["up"], whole.get("up_bias")).sin()
    expected = F.linear(hidden, whole["down"], whole.get("down_bias"))
    (expected * out).sum().backward()

    def main(group: Group) -> None:
        up = even((wide, H), 0, tp, group.rank)
        down = even((H, wide), 1, tp, group.rank)
        up_bias = even((wide,), 0, tp, group.rank)
        column = ColumnLinear(
            linear(up.cut(weights["up"]), up_bias.cut(weights["up_bias"]) if bias else None), group, sp
        )
        row = RowLinear(linear(down.cut(weights["down"]), weights.get("down_bias")), group, sp)
        local = rows(x, group, sp).clone().requires_grad_()
        y = row(column(local, CONTEXT).sin(), CONTEXT)
        close(y, rows(expected, group, sp))
        (y * rows(out, group, sp)).sum().backward()
        close(local.grad, rows(whole["x"].grad, group, sp))
        close(column.weight.grad, up.cut(whole["up"].grad))
        close(row.weight.grad, down.cut(whole["down"].grad))
        if bias:
            close(column.bias.grad, up_bias.cut(whole["up_bias"].grad))
            # under sp each rank sees its part of the sequence only
            grad = group.all_reduce(row.bias.grad.clone()) if sp else row.bias.grad
            close(grad, whole["down_bias"].grad)
        assert torch.equal(local, rows(x, group, sp))

    on_tp(tp, main)


Bits = list[Tensor | None]


def two_microbatches(module: nn.Module, inputs: list[Tensor], out: Tensor, deferred: list[Job] | None) -> Bits:
    """Outputs and gradients of x, weight and bias after two backwards; the jobs run after each."""
    calls: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, n=name: calls.update({n: calls.get(n, 0) + 1}))
    found: Bits = []
    for count, x in enumerate(inputs, 1):
        x = x.clone().requires_grad_()
        context = dataclasses.replace(CONTEXT, deferred=deferred)
        y = module(x) if type(module) is nn.Linear else module(x, context)
        (y * out).sum().backward()
        if deferred:
            assert calls.get("weight", 0) == count - 1
            while deferred:
                deferred.pop(0)()
        assert set(calls.values()) <= {count}
        found += [y.detach(), x.grad]
    assert set(calls) == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return found + [None if parameter.grad is None else parameter.grad.clone() for parameter in module.parameters()]


def same_bits(found: Bits, expected: Bits) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("deferred", [False, True], ids=["", "deferred"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(5,), (2, 12), (2, 3, 4)], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_one_rank_has_the_bits_of_torchs_linear(
    kind: type[ColumnLinear | RowLinear],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    bias: bool,
    frozen: bool,
    deferred: bool,
) -> None:
    wide = 71  # no multiple of a vector's length
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, H).to(dtype) for _ in range(2)]
    out = torch.randn(*shape, wide).to(dtype)
    ours, torchs = (nn.Linear(H, wide, bias=bias).to(dtype) for _ in range(2))
    ours.load_state_dict(torchs.state_dict())
    ours.weight.requires_grad_(not frozen)
    torchs.weight.requires_grad_(not frozen)
    module = kind(ours, Group([0], 0), False)
    jobs: list[Job] | None = [] if deferred else None
    expected = two_microbatches(torchs, inputs, out, None)
    same_bits(two_microbatches(module, inputs, out, jobs), expected)

    # the Function also where torch's own linear would do
    direct = nn.Linear(H, wide, bias=bias).to(dtype)
    direct.load_state_dict(torchs.state_dict())
    x = inputs[0].clone().requires_grad_()
    y = _Linear.apply(x, direct.weight, direct.bias, None, Group([0], 0), False, None)
    again = inputs[0].clone().requires_grad_()
    z = F.linear(again, torchs.weight.detach().requires_grad_(), torchs.bias)
    (y * out).sum().backward()
    (z * out).sum().backward()
    same_bits([y.detach(), x.grad], [z.detach(), again.grad])


@pytest.mark.parametrize("tp", [1, 2, 3])
@SP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deferred_gradients_are_the_immediate_ones(tp: int, sp: bool, dtype: torch.dtype) -> None:
    """Column, a nonlinearity, row; before a job has run its weight has no gradient, and it keeps two tensors."""
    wide = 12
    up, down = randn(wide, H, seed=1).to(dtype), randn(H, wide, seed=2).to(dtype)
    biases = randn(wide, seed=3).to(dtype), randn(H, seed=4).to(dtype)
    x, out = randn(B, S, H).to(dtype), randn(B, S, H, seed=9).to(dtype)

    def main(group: Group) -> None:
        sizes = group.size, group.rank
        found = []
        for deferred in (None, list[Job]()):
            first, second = linear(up, biases[0]), linear(down, biases[1])
            first.weight = nn.Parameter(even((wide, H), 0, *sizes).cut(up))
            first.bias = nn.Parameter(even((wide,), 0, *sizes).cut(biases[0]))
            second.weight = nn.Parameter(even((H, wide), 1, *sizes).cut(down))
            second.bias = nn.Parameter(biases[1].clone())
            column, row = ColumnLinear(first, group, sp), RowLinear(second, group, sp)
            context = dataclasses.replace(CONTEXT, deferred=deferred)
            local = rows(x, group, sp).clone().requires_grad_()
            hidden = column(local, context).sin()
            y = row(hidden, context)
            (y * rows(out, group, sp)).sum().backward()
            if deferred is not None:
                assert column.weight.grad is row.weight.grad is None
                kept = [[a for a in job.args[1:] if isinstance(a, Tensor)] for job in deferred]
                # the last linear's comes first
                assert [[list(a.shape) for a in tensors] for tensors in kept] == [
                    [[B, S, wide // tp], [B, S, H]],
                    [list(local.shape), [B, S, wide // tp]],
                ]
                assert kept[0][0].data_ptr() == hidden.data_ptr()
                assert kept[1][0].data_ptr() == local.data_ptr()
                assert not any(a.requires_grad for tensors in kept for a in tensors)
                for job in deferred:
                    job()
            found.append([y.detach(), local.grad, *(p.grad for p in (*column.parameters(), *row.parameters()))])
        same_bits(found[1], found[0])

    on_tp(tp, main)


def test_a_weight_has_a_job_where_its_input_needs_no_gradient() -> None:
    """As behind a frozen embedding."""
    module = linear(randn(4, 4))
    jobs: list[Job] = []
    y = ColumnLinear(module, Group([0], 0), False)(randn(B, S, 4), dataclasses.replace(CONTEXT, deferred=jobs))
    y.sum().backward()
    (job,) = jobs
    job()
    close(module.weight.grad, randn(B, S, 4).sum((0, 1)).expand(4, 4))


def test_a_frozen_weight_has_no_job() -> None:
    module = linear(randn(4, 4), randn(4))
    module.weight.requires_grad_(False)
    jobs: list[Job] = []
    column = ColumnLinear(module, Group([0], 0), False)
    column(randn(B, S, 4).requires_grad_(), dataclasses.replace(CONTEXT, deferred=jobs)).sum().backward()
    assert not jobs
    assert column.bias.grad is not None


def test_swapping_keeps_the_parameters() -> None:
    module = linear(randn(4, 4), randn(4))
    for twin in (ColumnLinear(module, Group([0], 0), False), RowLinear(module, Group([0], 0), False)):
        assert twin.weight is module.weight
        assert twin.bias is module.bias
        assert dict(twin.named_parameters()).keys() == {"weight", "bias"}
