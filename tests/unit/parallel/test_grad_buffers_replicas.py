"""Gradient buffers over replicas: the share of each, and parameters with another group of replicas."""

from typing import Any

import pytest
import torch
from nets import HUGE, ONE, TINY, data, model
from torch import nn

from megalite.parallel.grad_buffers import ALIGNMENT, GradBuffers
from megalite.parallel.groups import Group
from megalite.parallel.mesh import Mesh
from megalite.parallel.param_buffers import ParamBuffers
from megalite.parallel.threads import run_threads


@pytest.mark.parametrize("bucket_bytes", [TINY, 12 * 4, HUGE])
def test_shares_are_the_whole_and_hold_the_sum(bucket_bytes: float) -> None:
    def main(world: Any, sharded: bool) -> GradBuffers:
        net = model()
        buffers = GradBuffers(dict(net.named_parameters()), world.split([[0, 1, 2]]), bucket_bytes, True, sharded)
        buffers.begin(1)
        net(data(world.rank)).square().sum().backward()
        buffers.finish()
        buffers.scale(0.5)
        return buffers

    shared = run_threads(3, lambda world: main(world, True))
    whole = run_threads(3, lambda world: main(world, False))[0]
    for name, gradient in whole.main_grad.items():
        spans = [buffers.spans[name] for buffers in shared]
        assert [i for span in spans for i in span] == list(range(gradient.numel()))
        assert all(span.start % ALIGNMENT == 0 for span in spans if span)
        assert torch.equal(torch.cat([buffers.reduced[name] for buffers in shared]), gradient.flatten())
        assert [len(buffers.spans[name]) for buffers in shared] == [len(buffers.reduced[name]) for buffers in shared]
    for bucket in shared[0].buckets:
        assert bucket.flat.numel() % (3 * ALIGNMENT) == 0


def test_parameters_with_other_replicas_have_buckets_of_their_own() -> None:
    net = model()
    parameters = dict(net.named_parameters())
    few = Group([0, 4], 0)
    buffers = GradBuffers(parameters, ONE, HUGE, True, groups={"2.weight": few, "0.bias": Group([0, 4], 0)})
    assert [(bucket.group.ranks, bucket.names) for bucket in buffers.buckets] == [
        ((0,), ["4.bias", "4.weight", "2.bias", "0.weight"]),
        ((0, 4), ["2.weight", "0.bias"]),  # groups of the same ranks are one
    ]
    assert buffers.flat.numel() == sum(p.numel() for p in parameters.values())
    small = GradBuffers(parameters, ONE, TINY, True, groups={"2.weight": few}, alone={"2.weight"})
    assert [bucket.names for bucket in small.buckets][-1] == ["2.weight"]
    assert len(small.buckets) == 6


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bucket_bytes", [TINY, 12 * 4, HUGE])
def test_two_groups_of_replicas(bucket_bytes: float, overlap: bool, sharded: bool) -> None:
    """The middle layer is another one on each cp rank, as experts are, and is summed over dp alone."""
    middle = {"2.weight", "2.bias"}

    def network(cp: int) -> nn.Sequential:
        net = model()
        with torch.no_grad():
            net[2].weight.add_(cp)
        return net

    def main(world: Any) -> tuple[Mesh, GradBuffers, dict[str, nn.Parameter]]:
        mesh = Mesh(world, dp=2, cp=2)
        net = network(mesh.cp.rank)
        parameters = dict(net.named_parameters())
        both = mesh.group("dp", "cp")
        grads = GradBuffers(parameters, both, bucket_bytes, overlap, sharded, groups=dict.fromkeys(middle, mesh.dp))
        buffers = ParamBuffers(parameters, grads, net) if sharded else None
        for step in range(2):
            grads.begin(2)
            for m in range(2):
                net(data(100 * step + 10 * world.rank + m)).square().sum().backward()
            grads.finish()
        grads.scale(0.5)
        if buffers is not None:
            for share in buffers.shares.values():
                share.fill_(world.rank)
            buffers.gather()
            buffers.finish()
        return mesh, grads, parameters

    found = run_threads(4, main)
    alone = []
    for rank in range(4):
        net = network(rank % 2)
        for m in range(2):
            net(data(100 + 10 * rank + m)).square().sum().backward()
        alone.append({name: 0.5 * p.grad for name, p in net.named_parameters() if p.grad is not None})
    for mesh, grads, parameters in found:
        for name in alone[0]:
            ranks = mesh.dp.ranks if name in middle else range(4)
            expected = sum((alone[rank][name] for rank in ranks), torch.tensor(0.0))
            held = grads.held(name)
            torch.testing.assert_close(grads.reduced[name], expected.flatten()[held.start : held.stop])
            spans = [found[rank][1].spans[name] for rank in ranks]
            assert [i for span in spans for i in span] == list(range(expected.numel()))
            if sharded:  # each rank wrote its number into its share
                numbers = [rank for rank, span in zip(ranks, spans, strict=True) for _ in span]
                assert parameters[name].flatten().tolist() == numbers


def test_a_run_with_one_group_has_the_layout_of_before() -> None:
    """Naming each parameter's group says the same as one group for all."""
    parameters = dict(model().named_parameters())
    two = Group([0, 1], 0)
    every, one = (
        GradBuffers(parameters, group, 12 * 4, False, True, {"2.weight"}, groups=groups)
        for group, groups in ((ONE, dict.fromkeys(parameters, two)), (two, None))
    )
    assert [bucket.offsets for bucket in every.buckets] == [bucket.offsets for bucket in one.buckets]
    assert every.spans == one.spans
