"""Small stages for the executor, and ranks that watch what of their tensors is alive."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megalite.config.schedules import SCHEDULES
from megalite.parallel.threads import ThreadWorld, run_threads
from megalite.pipeline.executor import Jobs, Spec, Values, execute
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import Action, Plan, forward_only, make_plan

SHAPE = (2, 3)
HIDDEN = Spec(SHAPE, torch.float64, torch.device("cpu"))
# name, chunks
TRAINING = [(name, v) for name, row in SCHEDULES.items() for v in ((2, 3) if row.chunked else (1,))]


def weight(stage: int) -> Tensor:
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(stage), dtype=torch.float64)


def tokens(m: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + m), dtype=torch.float64)


class Product(torch.autograd.Function):
    """x W, whose weight gradient may be deferred."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, deferred: Jobs | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.deferred = weight, deferred
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        parameter, grad = ctx.weight, grads[0]
        if ctx.deferred is None:
            return grad @ weight.t(), x.t() @ grad, None
        ctx.deferred.append(lambda: torch.autograd.backward(parameter, x.t() @ grad))
        return grad @ weight.t(), None, None


@dataclass
class Link:
    """The threads' link; keeps a weak eye on what was sent, and writes down what was sent and waited for."""

    world: ThreadWorld
    sent: list[tuple[int, weakref.ref]] = field(default_factory=list)
    log: dict[int, list[str]] = field(default_factory=dict)

    def send(self, x: Tensor, peer: int) -> Any:
        self.sent.append((peer, weakref.ref(x)))
        self.world.send(x, peer)
        log = self.log.setdefault(peer, [])
        log.append("send")
        return SimpleNamespace(wait=lambda: log.append("wait"))

    def receive(self, buffer: Tensor, peer: int) -> Any:
        return self.world.receive(buffer, peer)


class Chunk:
    """A stage, with weak references to its tensors of each microbatch: in the graph, for W, and the output."""

    def __init__(self, stage: int, stages: int, training: bool) -> None:
        self.stage, self.last, self.training = stage, stage == stages - 1, training
        self.arriving = (HIDDEN,) if stage > 0 else ()
        self.leaving = () if self.last else (HIDDEN,)
        self.weight = weight(stage).requires_grad_()
        self.graph: dict[int, weakref.ref] = {}
        self.input: dict[int, weakref.ref] = {}
        self.out: dict[int, weakref.ref] = {}
        self.storage: dict[int, StorageWeakRef] = {}

    def forward(self, m: int, arrived: Values, deferred: Jobs | None) -> Values | dict[str, Tensor]:
        assert len(arrived) == len(self.arriving)
        assert torch.is_grad_enabled() == self.training
        x = arrived[0] if arrived else tokens(m)
        hidden = Product.apply(x, self.weight, deferred)
        # autograd saves the input of sin, and nothing of a sum
        out = hidden.sin() + 1
        self.graph[m], self.input[m] = weakref.ref(hidden), weakref.ref(x)
        if self.last:
            out = out.sum()
        self.out[m], self.storage[m] = weakref.ref(out), StorageWeakRef(out.untyped_storage())
        return {"loss": out, "largest": hidden.detach().amax()} if self.last else (out,)


class Rank:
    """One rank: its actions, its chunks, and what of their tensors is alive after every action."""

    def __init__(self, world: ThreadWorld, plan: Plan, stages: int, training: bool) -> None:
        self.rank, self.actions, self.training = world.rank, plan[world.rank], training
        self.link, self.ranks = Link(world), range(world.size)
        own = range(self.rank, stages, world.size)
        self.chunks = {stage: Chunk(stage, stages, training) for stage in own}
        self.last = stages - 1 in self.chunks
        self.done: list[Action] = []
        self.live: list[tuple[int, int]] = []
        self.reduced: list[int] = []

    def began(self, action: Action) -> None:
        """Overridden where more is watched."""

    def ended(self, action: Action) -> None:
        self.done.append(action)
        kinds = ([ref for c in self.chunks.values() for ref in kept(c).values()] for kept in (graph_of, input_of))
        graph, inputs = (sum(ref() is not None for ref in refs) for refs in kinds)
        self.live.append((graph, inputs))
        self.look()

    def look(self) -> None:
        """Overridden where more is watched."""

    def run(self) -> "Rank":
        self.results = execute(
            Watched(self),
            self.chunks,
            link=self.link,
            ranks=self.ranks,
            training=self.training,
            reduce=self.reduced.append,
        )
        return self


def graph_of(chunk: Chunk) -> dict[int, weakref.ref]:
    return chunk.graph


def input_of(chunk: Chunk) -> dict[int, weakref.ref]:
    return chunk.input


class Watched(list[Action]):
    """A rank's actions: whoever takes one shows that it begins, and with the next one that it has ended."""

    def __init__(self, rank: Rank) -> None:
        super().__init__(rank.actions)
        self.rank = rank

    def __iter__(self) -> Iterator[Action]:
        # only the last walk through the list runs it
        self.rank.done, self.rank.live = [], []
        for action in super().__iter__():
            self.rank.began(action)
            yield action
            self.rank.ended(action)


def plan_of(schedule: str, p: int, m: int, v: int) -> Plan:
    return forward_only(p, m, v) if schedule == "forward_only" else make_plan(schedule, p, m, v)


def play(schedule: str, p: int, m: int, v: int, kind: type[Rank] = Rank) -> list[Rank]:
    plan, training = lower(plan_of(schedule, p, m, v)), schedule != "forward_only"
    return run_threads(p, lambda world: kind(world, plan, p * v, training).run(), timeout_s=20)
