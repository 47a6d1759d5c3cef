"""Runs one rank's list of actions: it only obeys.

An activation is given away as soon as it is sent: what stays is the gradient edge of the output, from which autograd
goes on when the gradient arrives. What backward needs of the activations is kept by the graph, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.profiler import record_function

from megalite.pipeline.schedule import Action


class Pending(Protocol):
    def wait(self) -> object: ...


class Link(Protocol):
    """How a stage reaches its neighbours: torch.distributed, or queues between threads."""

    def send(self, x: Tensor, peer: int) -> Pending: ...

    def receive(self, buffer: Tensor, peer: int) -> Pending: ...


class _Outbox:
    """Sends return at once and hold their tensor; the next one to the same peer first lets the last one go."""

    def __init__(self, link: Link, ranks: Sequence[int]) -> None:
        self.link, self.ranks = link, ranks
        self.under_way: dict[int, tuple[Tensor, Pending]] = {}

    def send(self, x: Tensor, peer: int) -> None:
        self._finish(peer)
        self.under_way[peer] = (x, self.link.send(x, self.ranks[peer]))

    def _finish(self, peer: int) -> None:
        if peer in self.under_way:
            self.under_way.pop(peer)[1].wait()

    def drain(self) -> None:
        for peer in list(self.under_way):
            self._finish(peer)


def execute(
    actions: Sequence[Action],
    forward: Callable[[int, Tensor | None], Tensor],
    *,
    link: Link,
    ranks: Sequence[int],
    hidden: Tensor,
    training: bool,
    loss_scale: float = 1.0,
    reduce: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Run `actions`, one rank's list of a lowered plan, and give back the last stage's outputs, one per microbatch.

    `forward(microbatch, input)` is the stage (input None: it reads tokens); `ranks` are the global ranks of the
    pipeline; `hidden` is any tensor of the shape, dtype and device that travels between stages. `training` keeps what
    backward needs; the outputs' gradients are `loss_scale`; `reduce` is called at REDUCE. Under torch's profiler each
    action is a range of its name.
    """
    outbox = _Outbox(link, ranks)
    received: dict[tuple[str, int], tuple[Tensor, Pending]] = {}
    ready: dict[tuple[str, int], Tensor] = {}
    inputs: dict[int, Tensor | None] = {}
    edges: dict[int, GradientEdge | None] = {}
    outputs: list[Tensor] = []
    sent = {(action.of, action.microbatch) for action in actions if action.op == "SEND"}

    def arrived(of: str, m: int) -> Tensor | None:
        if (of, m) not in received:
            return None
        buffer, pending = received.pop((of, m))
        pending.wait()
        return buffer

    def run_forward(m: int) -> None:
        x = arrived("F", m)
        if x is not None and training:
            x.requires_grad_()
        out = forward(m, x)
        if training:
            # a first stage that trains nothing has nothing to go back through
            inputs[m], edges[m] = x, get_gradient_edge(out) if out.requires_grad else None
        if ("F", m) in sent:
            ready["F", m] = out.detach()
        else:
            outputs.append(out.detach())

    def run_backward(m: int) -> None:
        gradient = arrived("B", m)
        if gradient is None:
            gradient = torch.full_like(outputs[m], loss_scale)
        edge, x = edges.pop(m), inputs.pop(m)
        if edge is not None:
            torch.autograd.backward((edge,), (gradient,))
        if x is not None:
            assert x.grad is not None
            ready["B", m] = x.grad

    with nullcontext() if training else torch.no_grad():
        for action in actions:
            m = action.microbatch
            with record_function(str(action)):
                match action.op:
                    case "F":
                        run_forward(m)
                    case "B":
                        run_backward(m)
                    case "SEND":
                        outbox.send(ready.pop((action.of, m)), action.peer)
                    case "RECV":
                        buffer = torch.empty_like(hidden)
                        received[action.of, m] = (buffer, link.receive(buffer, ranks[action.peer]))
                    case "REDUCE":
                        if reduce is not None:
                            reduce()
                    case _:
                        raise AssertionError(f"the executor cannot run {action}")
        outbox.drain()
    return outputs
