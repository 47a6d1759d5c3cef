"""The flat gradient buffer: where gradients lie, and how they add up."""

from typing import Any

import pytest
import torch
from nets import HUGE, ONE, TINY, data, model
from torch import Tensor, nn

from megalite.parallel.grad_buffers import GradBuffers, all_reduce_together
from megalite.parallel.threads import run_threads


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


def test_a_parameter_alone_has_a_bucket_of_its_own() -> None:
    buffers = GradBuffers(dict(model().named_parameters()), ONE, HUGE, True, alone={"2.weight"})
    assert [bucket.names for bucket in buffers.buckets] == [
        ["4.bias", "4.weight", "2.bias"],
        ["2.weight"],
        ["0.bias", "0.weight"],
    ]
