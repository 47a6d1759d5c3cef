"""The executor keeps what the simulation says, gives away what it sent, and computes what one process would."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megalite.parallel.threads import ThreadWorld, run_threads
from megalite.pipeline.executor import execute
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import Action, forward_only, make_plan
from megalite.pipeline.simulate import simulate

SHAPE = (2, 3)
TRAINING = pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])


def weight(stage: int) -> Tensor:
    return torch.randn(3, 3, generator=torch.Generator().manual_seed(stage), dtype=torch.float64)


def tokens(m: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + m), dtype=torch.float64)


@dataclass
class Link:
    """The threads' link; keeps a weak eye on what was sent, and writes down what was sent and waited for."""

    world: ThreadWorld
    sent: list[tuple[int, weakref.ref]] = field(default_factory=list)
    said: dict[int, list[str]] = field(default_factory=dict)

    def send(self, x: Tensor, peer: int) -> Any:
        self.sent.append((peer, weakref.ref(x)))
        self.world.send(x, peer)
        said = self.said.setdefault(peer, [])
        said.append("send")
        return SimpleNamespace(wait=lambda: said.append("wait"))

    def receive(self, buffer: Tensor, peer: int) -> Any:
        return self.world.receive(buffer, peer)


class Stage:
    """One rank: its actions, its forward, and what of its tensors is alive after every action."""

    def __init__(self, world: ThreadWorld, actions: list[Action], training: bool) -> None:
        self.rank, self.last = world.rank, world.rank == world.size - 1
        self.actions, self.training = actions, training
        self.link = Link(world)
        self.weight = weight(self.rank).requires_grad_()
        self.saved: dict[int, weakref.ref] = {}
        self.out: dict[int, weakref.ref] = {}
        self.storage: dict[int, StorageWeakRef] = {}
        self.done: list[str] = []
        self.live: list[int] = []
        self.reduced = 0
        self.ranks = range(world.size)

    def forward(self, m: int, x: Tensor | None) -> Tensor:
        assert (x is None) == (self.rank == 0)
        assert torch.is_grad_enabled() == self.training
        hidden = (tokens(m) if x is None else x) @ self.weight
        self.saved[m] = weakref.ref(hidden)  # autograd saves the input of sin
        out = hidden.sin() + 1  # and nothing of a sum
        if self.last:
            out = out.sum()
        self.out[m], self.storage[m] = weakref.ref(out), StorageWeakRef(out.untyped_storage())
        return out

    def began(self, name: str) -> None:
        """Overridden where more is watched."""

    def ended(self, name: str) -> None:
        self.done.append(name)
        self.live.append(sum(ref() is not None for ref in self.saved.values()))
        self.look()

    def look(self) -> None:
        """Overridden where more is watched."""

    def run(self) -> "Stage":
        self.results = execute(
            Watched(self),
            self.forward,
            link=self.link,
            ranks=self.ranks,
            hidden=torch.empty(SHAPE, dtype=torch.float64),
            training=self.training,
            reduce=self.reduce,
        )
        return self

    def reduce(self) -> None:
        self.reduced += 1


class Watched(list[Action]):
    """A stage's actions: whoever takes one shows that it begins, and with the next one that it has ended."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.actions)
        self.stage = stage

    def __iter__(self) -> Iterator[Action]:
        # only the last walk through the list runs it
        self.stage.done, self.stage.live = [], []
        for action in super().__iter__():
            self.stage.began(str(action))
            yield action
            self.stage.ended(str(action))


def play(schedule: str, p: int, m: int, kind: type[Stage] = Stage) -> list[Stage]:
    training = schedule != "forward_only"
    plan = lower(make_plan(schedule, p, m) if training else forward_only(p, m))
    return run_threads(p, lambda world: kind(world, plan[world.rank], training).run(), timeout_s=20)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@TRAINING
def test_live_activations_are_those_of_the_simulation(schedule: str, p: int) -> None:
    for m in range(1, 9):
        stages = play(schedule, p, m)
        assert [max(stage.live) for stage in stages] == simulate(make_plan(schedule, p, m)).peak_live, (p, m)
        for stage in stages:
            assert stage.live[-1] == 0
            assert stage.done == [str(action) for action in stage.actions]
            # after every action, not at the peak alone
            forwards = [
                sum(f"{stage.rank}F" in name and "_" not in name for name in stage.done[:i]) for i in ends(stage)
            ]
            backwards = [
                sum(f"{stage.rank}B" in name and "_" not in name for name in stage.done[:i]) for i in ends(stage)
            ]
            assert stage.live == [f - b for f, b in zip(forwards, backwards)]


def ends(stage: Stage) -> range:
    return range(1, len(stage.done) + 1)


class Outputs(Stage):
    """A stage that looks where the tensors it gave away are."""

    def look(self) -> None:
        # the tensor with a graph behind it is gone with its forward; its gradient edge is enough
        assert all(ref() is None for ref in self.out.values())
        # what travels is held until the next one travels to the same rank
        for peer in {peer for peer, _ in self.link.sent}:
            held = [ref() is not None for to, ref in self.link.sent if to == peer]
            assert not any(held[:-1])
        if not self.last:
            under_way = [not storage.expired() for storage in self.storage.values()]
            assert sum(under_way) <= 2  # the last one sent, and one whose SEND is the next action
            name = self.done[-1]
            if under_way and name.startswith(f"{self.rank}SEND_F"):  # the list may be walked before it is run
                assert under_way == [False] * (len(under_way) - 1) + [True]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 5), (4, 8)])
@TRAINING
def test_outputs_are_freed_after_their_send(schedule: str, p: int, m: int) -> None:
    for stage in play(schedule, p, m, Outputs):
        assert len(stage.out) == m
        # nothing is held once the list is done
        assert all(ref() is None for _, ref in stage.link.sent)
        assert stage.last or all(storage.expired() for storage in stage.storage.values())


class Sent(Stage):
    """Notes whether an output's memory is free when its own backward has come to its turn."""

    free_at_backward: dict[int, bool]

    def began(self, name: str) -> None:
        if name == f"{self.rank}B0":
            self.free_at_backward = {m: storage.expired() for m, storage in self.storage.items()}


def test_a_sent_outputs_memory_is_free_before_its_backward() -> None:
    """GPipe on two ranks: when the first backward starts, of four outputs only the last one sent is held."""
    first = play("gpipe", 2, 4, Sent)[0]
    assert first.free_at_backward == {0: True, 1: True, 2: True, 3: False}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "forward_only"])
def test_every_send_is_waited_for_before_the_next_to_the_same_rank(schedule: str) -> None:
    for stage in play(schedule, 3, 4):
        down = [stage.rank + 1] * (stage.rank < 2)
        up = [stage.rank - 1] * (stage.rank > 0 and schedule != "forward_only")
        assert stage.link.said == {peer: ["send", "wait"] * 4 for peer in down + up}


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_forward_only_keeps_nothing(p: int) -> None:
    for stage in play("forward_only", p, 5):
        assert stage.live == [0] * len(stage.done)
        assert all(ref() is None for ref in stage.out.values())
        assert stage.reduced == 0
        assert len(stage.results) == (5 if stage.last else 0)
        assert not any(result.requires_grad for result in stage.results)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@TRAINING
def test_results_and_gradients_are_those_of_one_process(schedule: str, p: int) -> None:
    weights = [weight(stage).requires_grad_() for stage in range(p)]
    losses = []
    for m in range(5):
        x = tokens(m)
        for w in weights:
            x = (x @ w).sin() + 1
        losses.append(x.sum().detach())
        x.sum().backward()
    stages = play(schedule, p, 5)
    assert [len(stage.results) for stage in stages] == [0] * (p - 1) + [5]
    assert all(torch.equal(a, b) for a, b in zip(stages[-1].results, losses))
    assert not any(result.requires_grad for result in stages[-1].results)
    # every schedule sums the microbatches in the same order, so to the bit
    assert all(torch.equal(stage.weight.grad, w.grad) for stage, w in zip(stages, weights))
    assert [stage.reduced for stage in stages] == [1] * p
    for forward in play("forward_only", p, 5)[-1:]:
        assert all(torch.equal(a, b) for a, b in zip(forward.results, losses))


def test_an_action_it_does_not_know_is_refused() -> None:
    def main(world: ThreadWorld) -> None:
        stage = Stage(world, [Action(0, "F", 0), Action(0, "I", 0)], True)
        with pytest.raises(AssertionError, match="cannot run 0I0"):
            stage.run()

    run_threads(1, main)
