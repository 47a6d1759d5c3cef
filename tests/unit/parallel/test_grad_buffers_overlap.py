"""When a bucket of gradients starts to travel, and that overlap changes no bit."""

from typing import Any

import pytest
import torch
from nets import HUGE, ONE, TINY, data, model
from torch import Tensor, nn

from megalite.parallel.grad_buffers import GradBuffers
from megalite.parallel.groups import Group, Pending
from megalite.parallel.threads import run_threads


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
