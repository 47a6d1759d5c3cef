"""Runs one rank's list of actions: it only obeys.

A rank holds one or more stages (chunks). What travels between stages is a tuple of tensors whose shapes are known
beforehand. An activation is released as soon as it is sent: what stays is the gradient edge of the output, from which
autograd continues when the gradient arrives. What backward needs of the activations is kept by the graph, and by
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.profiler import record_function

from megalite.pipeline.schedule import Action

Values = tuple[Tensor, ...]
Jobs = list[Callable[[], None]]


class Pending(Protocol):
    def wait(self) -> object: ...


class Link(Protocol):
    """How a stage reaches its neighbours: torch.distributed, or queues between threads."""

    def send(self, x: Tensor, peer: int) -> Pending: ...

    def receive(self, buffer: Tensor, peer: int) -> Pending: ...


@dataclass(frozen=True)
class Spec:
    """One tensor that travels between two stages. `gradient`: whether a gradient of it travels back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    gradient: bool = True

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Chunk(Protocol):
    """One stage of this rank. `arriving`, `leaving`: what it receives and what it hands on; () at the two ends."""

    @property
    def arriving(self) -> tuple[Spec, ...]: ...

    @property
    def leaving(self) -> tuple[Spec, ...]: ...

    def forward(self, microbatch: int, arrived: Values, deferred: Jobs | None) -> Values | dict[str, Tensor]:
        """The tensors of `leaving`; of the last stage named results, in training with a scalar `loss`.

        deferred: None, or the list to which backward appends what computes weight gradients instead of computing them.
        """
        ...


def execute(
    actions: Sequence[Action],
    chunks: Mapping[int, Chunk],
    *,
    link: Link,
    ranks: Sequence[int],
    training: bool,
    loss_scale: float = 1.0,
    reduce: Callable[[int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Run `actions`, one rank's list of a lowered plan, and return the last stage's results, one per microbatch.

    chunks: the stages of this rank by number. ranks: global ranks of the pipeline. training: keep what backward needs;
    the gradient of each `loss` is `loss_scale`. reduce: called with the stage at REDUCE. Under torch's profiler each
    action is a range of its name. Only the last stage's rank has results; [] elsewhere.
    """
    run = _Run(actions, chunks, link, ranks, training, loss_scale)
    with nullcontext() if training else torch.no_grad():
        for action in actions:
            with record_function(str(action)):
                if action.op == "REDUCE":
                    if reduce is not None:
                        reduce(action.stage)
                else:
                    assert action.op in run.steps, f"the executor cannot run {action}"
                    run.steps[action.op](action)
        run.outbox.drain()
    return [run.results[m] for m in sorted(run.results)]


class _Outbox:
    """Sends return at once and hold their tensors; the next one to the same peer first waits for the last."""

    def __init__(self, link: Link, ranks: Sequence[int]) -> None:
        self.link, self.ranks = link, ranks
        self.under_way: dict[int, list[tuple[Tensor, Pending]]] = {}

    def send(self, values: Values, peer: int) -> None:
        self._finish(peer)
        self.under_way[peer] = [(x, self.link.send(x, self.ranks[peer])) for x in values]

    def _finish(self, peer: int) -> None:
        for _, pending in self.under_way.pop(peer, ()):
            pending.wait()

    def drain(self) -> None:
        for peer in list(self.under_way):
            self._finish(peer)


def _take_gradient(x: Tensor) -> Tensor:
    """x.grad, which then no longer hangs on x: a deferred weight gradient may keep x for long."""
    gradient, x.grad = x.grad, None
    # the stage before waits for a gradient of every value, used or not
    return torch.zeros_like(x) if gradient is None else gradient


class _Run:
    """What one rank holds between its actions. A value in transit is keyed by (F or B, the stage it goes to, m)."""

    def __init__(
        self,
        actions: Sequence[Action],
        chunks: Mapping[int, Chunk],
        link: Link,
        ranks: Sequence[int],
        training: bool,
        loss_scale: float,
    ) -> None:
        self.chunks, self.link, self.ranks = chunks, link, ranks
        self.training, self.loss_scale = training, loss_scale
        self.outbox = _Outbox(link, ranks)
        self.results: dict[int, dict[str, Tensor]] = {}
        self.splits = {(a.stage, a.microbatch) for a in actions if a.op == "W"}
        self.values: dict[tuple[str, int, int], Values] = {}
        self.receiving: dict[tuple[str, int, int], list[tuple[Tensor, Pending]]] = {}
        self.inputs: dict[tuple[int, int], Values] = {}
        self.edges: dict[tuple[int, int], list[GradientEdge | None]] = {}
        self.deferred: dict[tuple[int, int], Jobs] = {}
        self.steps: dict[str, Callable[[Action], None]] = {
            "F": self.forward,
            "B": self.backward,
            "I": self.backward,
            "W": self.weight_gradients,
            "SEND": self.send,
            "RECV": self.receive,
        }

    def forward(self, action: Action) -> None:
        stage, m = key = action.stage, action.microbatch
        chunk, values = self.chunks[stage], self.take("F", stage, m)
        for x, spec in zip(values, chunk.arriving, strict=True):
            x.requires_grad_(self.training and spec.gradient)
        if key in self.splits:
            self.deferred[key] = []
        out = chunk.forward(m, values, self.deferred.get(key))
        if isinstance(out, dict):
            self.results[m] = {name: x.detach() for name, x in out.items()}
            differentiable = [out["loss"]] if self.training else []
        else:
            self.values["F", stage + 1, m] = tuple(x.detach() for x in out)
            differentiable = [x for x, spec in zip(out, chunk.leaving, strict=True) if spec.gradient]
        if self.training:
            self.inputs[key] = tuple(x for x, spec in zip(values, chunk.arriving) if spec.gradient)
            # a stage that trains nothing and receives nothing has no graph to go back through
            self.edges[key] = [get_gradient_edge(x) if x.requires_grad else None for x in differentiable]

    def backward(self, action: Action) -> None:
        stage, m = key = action.stage, action.microbatch
        gradients = self.take("B", stage, m)
        if not self.chunks[stage].leaving:
            gradients = (torch.full_like(self.results[m]["loss"], self.loss_scale),)
        pairs = zip(self.edges.pop(key), gradients, strict=True)
        if there := [(edge, gradient) for edge, gradient in pairs if edge is not None]:
            torch.autograd.backward(tuple(e for e, _ in there), tuple(g for _, g in there))
        inputs = self.inputs.pop(key)
        if self.chunks[stage].arriving:
            self.values["B", stage - 1, m] = tuple(map(_take_gradient, inputs))

    def weight_gradients(self, action: Action) -> None:
        for job in self.deferred.pop((action.stage, action.microbatch)):
            job()

    def send(self, action: Action) -> None:
        step = 1 if action.of == "F" else -1
        self.outbox.send(self.values.pop((action.of, action.stage + step, action.microbatch)), action.peer)

    def receive(self, action: Action) -> None:
        chunk, peer = self.chunks[action.stage], self.ranks[action.peer]
        specs = chunk.arriving if action.of == "F" else [spec for spec in chunk.leaving if spec.gradient]
        buffers = [spec.empty() for spec in specs]
        self.receiving[action.of, action.stage, action.microbatch] = [(x, self.link.receive(x, peer)) for x in buffers]

    def take(self, of: str, stage: int, m: int) -> Values:
        """What another stage has made for this one, on another rank or on this."""
        if (of, stage, m) not in self.receiving:
            return self.values.pop((of, stage, m), ())
        arrived = self.receiving.pop((of, stage, m))
        for _, pending in arrived:
            pending.wait()
        return tuple(x for x, _ in arrived)
