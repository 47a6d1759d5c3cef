"""The flat gradient buffer: where gradients lie, how they add up, and when a bucket travels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalite.parallel.grad_buffers import ALIGNMENT, GradBuffers, all_reduce_together
from megalite.parallel.groups import Group, Pending
from megalite.parallel.mesh import Mesh
from megalite.parallel.param_buffers import ParamBuffers
from megalite.parallel.threads import run_threads

ONE = Group([0], 0)
HUGE, TINY = 2.0**40, 1.0


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    generator = torch.Generator().manual_seed(0)  # threads share the global one
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0.0, 0.5, generator=generator)
    return net.to(dtype)


def data(seed: int) -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))


class Recorder(Group):
    """A group of two whose other rank never speaks: writes down what is started and waited for."""

    def __init__(self, buffers: list[str]) -> None:
        super().__init__([0, 1], 0)
        self.said = buffers

    def start_all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        said, number = self.said, sum(word.startswith("start") for word in self.said)
        said.append(f"start {number}")

        class Wait:
            def wait(self) -> None:
                said.append(f"wait {number}")

        return Wait()


def test_layout() -> None:
    net = model()
    parameters = dict(net.named_parameters())
    buffers = GradBuffers(parameters, ONE, HUGE, overlap=True)
    assert buffers.flat.shape == (sum(p.numel() for p in parameters.values()),)
    assert buffers.main_grad.keys() == parameters.keys()
    offset = 0
    for name in list(parameters)[::-1]:  # as backward reaches them
        view = buffers.main_grad[name]
        assert view.shape == parameters[name].shape
        assert view.is_contiguous()
        assert view.data_ptr() == buffers.flat[offset:].data_ptr()
        offset += view.numel()


@pytest.mark.parametrize(
    ("bucket_bytes", "sizes"),
    [
        # last layer's bias 2 and weight 10, then 5 and 20, then 4 and 12, at 4 bytes an element
        (TINY, [2, 10, 5, 20, 4, 12]),
        (12 * 4, [12, 25, 16]),
        (12 * 4 + 1, [17, 20, 16]),
        (HUGE, [53]),
    ],
)
def test_buckets_close_when_full(bucket_bytes: float, sizes: list[int]) -> None:
    buffers = GradBuffers(dict(model().named_parameters()), ONE, bucket_bytes, overlap=True)
    assert [bucket.flat.numel() for bucket in buffers.buckets] == sizes
    assert [name for bucket in buffers.buckets for name in bucket.names] == list(buffers.main_grad)
    start = 0
    for bucket in buffers.buckets:  # one after the other in one buffer
        assert bucket.flat.data_ptr() == buffers.flat[start:].data_ptr()
        start += bucket.flat.numel()


def test_gradients_add_up_over_microbatches_and_steps_begin_afresh() -> None:
    net, plain = model(), model()
    buffers = GradBuffers(dict(net.named_parameters()), ONE, HUGE, overlap=True)
    for step in range(2):
        plain.zero_grad()
        buffers.begin(3)
        for m in range(3):
            for each in (net, plain):
                each(data(10 * step + m)).square().sum().backward()
        buffers.finish()
        for name, p in plain.named_parameters():
            assert torch.equal(buffers.main_grad[name], p.grad)
            assert net.get_parameter(name).grad is buffers.main_grad[name]


def test_half_precision_adds_up_in_fp32() -> None:
    """257 ones are 256 when summed in bfloat16."""
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    buffers = GradBuffers({"p": p}, ONE, HUGE, overlap=True)
    buffers.begin(257)
    for _ in range(257):
        p.sum().backward()
    assert buffers.main_grad["p"].dtype == torch.float32
    assert buffers.main_grad["p"].tolist() == [257, 257, 257]
    assert p.grad is None


def test_a_float64_gradient_stays_float64() -> None:
    assert GradBuffers(dict(model(torch.float64).named_parameters()), ONE, HUGE, True).flat.dtype == torch.float64


def run_recorded(overlap: bool, bucket_bytes: float = TINY, microbatches: int = 2) -> list[str]:
    """What happens in one step: "B2 of 1" when the gradient reaches the output of layer 2 in microbatch 1."""
    said: list[str] = []
    net = model()
    buffers = GradBuffers(dict(net.named_parameters()), Recorder(said), bucket_bytes, overlap)
    buffers.begin(microbatches)
    for m in range(microbatches):
        x = data(m)
        for number, layer in enumerate(net):
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x.register_hook(lambda grad, number=number, m=m: said.append(f"B{number} of {m}"))
        x.square().sum().backward()
    said.append("finish")
    buffers.finish()
    return said


def test_a_bucket_starts_when_its_last_gradient_of_the_last_microbatch_is_there() -> None:
    said = run_recorded(overlap=True, bucket_bytes=12 * 4)
    assert said[:3] == ["B4 of 0", "B2 of 0", "B0 of 0"]
    assert said[3:9] == ["B4 of 1", "start 0", "B2 of 1", "start 1", "B0 of 1", "start 2"]
    assert said[9:] == ["finish", "wait 0", "wait 1", "wait 2"]


def test_without_overlap_nothing_starts_before_the_end() -> None:
    said = run_recorded(overlap=False)
    assert said[6:] == ["finish", *(f"start {i}" for i in range(6)), *(f"wait {i}" for i in range(6))]


def test_a_parameter_used_twice_is_waited_for_once() -> None:
    """Tied weights on one stage: both uses are in the gradient before the bucket travels."""
    said: list[str] = []
    w = nn.Parameter(torch.eye(2))
    buffers = GradBuffers({"w": w}, Recorder(said), TINY, overlap=True)
    buffers.begin(1)
    x = torch.ones(1, 2) @ w
    x.register_hook(lambda grad: said.append("first use"))
    (x @ w).sum().backward()
    assert said == ["first use", "start 0"]
    assert buffers.main_grad["w"].tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_changes_no_bit(dtype: torch.dtype) -> None:
    def main(world: Any, overlap: bool) -> Tensor:
        net = model(dtype)
        group = world.split([[0, 1, 2]])
        buffers = GradBuffers(dict(net.named_parameters()), group, 12 * 4, overlap)
        for _ in range(2):  # a second step must not see the first one's pending
            buffers.begin(2)
            for m in range(2):
                net(data(10 * world.rank + m).to(dtype)).square().sum().backward()
            buffers.finish()
        return buffers.flat

    with_overlap = run_threads(3, lambda world: main(world, True))
    without = run_threads(3, lambda world: main(world, False))
    assert all(torch.equal(flat, with_overlap[0]) for flat in with_overlap + without)

    # and it is the sum of what each replica alone would have
    total = torch.zeros_like(with_overlap[0])
    for rank in range(3):
        net = model(dtype)
        buffers = GradBuffers(dict(net.named_parameters()), ONE, HUGE, overlap=True)
        buffers.begin(2)
        for m in range(2):
            net(data(10 * rank + m).to(dtype)).square().sum().backward()
        total += buffers.flat
    torch.testing.assert_close(with_overlap[0], total, rtol=1e-5, atol=1e-6)


def test_all_reduce_together() -> None:
    def main(world: Any) -> list[Tensor]:
        r = float(world.rank + 1)
        big = torch.full((4, 4), r)
        tensors = [torch.full((3,), r), big[:, 1:3], torch.tensor(10 * r)]  # the second lies in strides
        all_reduce_together(tensors, world.split([[0, 1, 2]]))
        all_reduce_together([], world.split([[0, 1, 2]]))
        assert bool((big[:, 0] == r).all())
        return tensors

    for tensors in run_threads(3, main):
        assert [t.unique().tolist() for t in tensors] == [[6], [6], [60]]


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


def test_a_parameter_alone_has_a_bucket_of_its_own() -> None:
    buffers = GradBuffers(dict(model().named_parameters()), ONE, HUGE, True, alone={"2.weight"})
    assert [bucket.names for bucket in buffers.buckets] == [
        ["4.bias", "4.weight", "2.bias"],
        ["2.weight"],
        ["0.bias", "0.weight"],
    ]


def test_parameters_are_gathered_before_they_are_used() -> None:
    """Each rank writes its number into its share; whichever module runs first sees all of them."""

    def main(world: Any) -> list[Tensor]:
        net = model()
        parameters = dict(net.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        grads = GradBuffers(parameters, world.split([[0, 1, 2]]), 12 * 4, True, True)
        buffers = ParamBuffers(parameters, grads, net)
        assert all(torch.equal(p, before[name]) for name, p in parameters.items())
        for share in buffers.shares.values():
            share.fill_(world.rank)
        buffers.gather()
        net[2](torch.zeros(1, 4))
        for name in ("2.weight", "2.bias"):
            assert torch.equal(parameters[name], parameters[name].round())
        buffers.finish()
        return [p.detach() for p in parameters.values()]

    ranks = run_threads(3, main)
    for tensors in zip(*ranks):
        assert all(torch.equal(t, tensors[0]) for t in tensors)
        assert set(tensors[0].unique().tolist()) <= {0.0, 1.0, 2.0}


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
