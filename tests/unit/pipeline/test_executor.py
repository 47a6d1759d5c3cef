"""The executor keeps what the simulation says, releases what it sent, and computes what one process would."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megalite.config.schedules import SCHEDULES
from megalite.parallel.threads import ThreadWorld, run_threads
from megalite.pipeline.executor import Jobs, Spec, Values, execute
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import Action, Plan, forward_only, make_plan
from megalite.pipeline.simulate import simulate

SHAPE = (2, 3)
HIDDEN = Spec(SHAPE, torch.float64, torch.device("cpu"))
# name, chunks
TRAINING = [(name, v) for name, row in SCHEDULES.items() for v in ((2, 3) if row.chunked else (1,))]
EVERY = [*TRAINING, ("forward_only", 1), ("forward_only", 2)]


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


def sizes(p: int, v: int, most: int = 8) -> range:
    """Numbers of microbatches that the schedule takes."""
    return range(p if v > 1 else 1, most + 1, p if v > 1 else 1)


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_live_activations_are_those_of_the_simulation(schedule: str, v: int, p: int) -> None:
    for m in sizes(p, v):
        ranks = play(schedule, p, m, v)
        peaks = simulate(make_plan(schedule, p, m, v)).peak_live
        assert [max(inputs for _, inputs in rank.live) for rank in ranks] == peaks, (p, m)
        for rank in ranks:
            assert rank.live[-1] == (0, 0)
            assert rank.done == rank.actions
            # after every action, not at the peak alone; the graph is gone with the input gradient
            ops = [[action.op for action in rank.done[: i + 1]] for i in range(len(rank.done))]
            graphs = [o.count("F") - o.count("B") - o.count("I") for o in ops]
            inputs = [o.count("F") - o.count("B") - o.count("W") for o in ops]
            assert rank.live == list(zip(graphs, inputs))


class Outputs(Rank):
    """A rank that looks where the tensors it gave away are."""

    def look(self) -> None:
        # the tensor with a graph behind it is gone with its forward; its gradient edge is enough
        assert all(ref() is None for chunk in self.chunks.values() for ref in chunk.out.values())
        # what travels is held until the next one travels to the same rank
        for peer in {peer for peer, _ in self.link.sent}:
            held = [ref() is not None for to, ref in self.link.sent if to == peer]
            assert not any(held[:-1])
        for chunk in self.chunks.values():
            if not chunk.last and len(self.ranks) > 1:
                under_way = [not storage.expired() for storage in chunk.storage.values()]
                assert sum(under_way) <= 2  # the last one sent, and one whose SEND is the next action
                action = self.done[-1]
                if under_way and (action.stage, action.op, action.of) == (chunk.stage, "SEND", "F"):
                    assert under_way == [False] * (len(under_way) - 1) + [True]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 6), (4, 8)])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_outputs_are_freed_after_their_send(schedule: str, v: int, p: int, m: int) -> None:
    for rank in play(schedule, p, m, v, Outputs):
        # nothing is held once the list is done
        assert all(ref() is None for _, ref in rank.link.sent)
        for chunk in rank.chunks.values():
            assert len(chunk.out) == m
            assert chunk.last or all(storage.expired() for storage in chunk.storage.values())


class Sent(Rank):
    """Notes whether an output's memory is free when its own backward has come to its turn."""

    free_at_backward: dict[int, bool]

    def began(self, action: Action) -> None:
        if str(action) == f"{self.rank}B0":
            self.free_at_backward = {m: x.expired() for m, x in self.chunks[self.rank].storage.items()}


def test_a_sent_outputs_memory_is_free_before_its_backward() -> None:
    """GPipe on two ranks: when the first backward starts, of four outputs only the last one sent is held."""
    first = play("gpipe", 2, 4, 1, Sent)[0]
    assert first.free_at_backward == {0: True, 1: True, 2: True, 3: False}


@pytest.mark.parametrize(("schedule", "v"), EVERY)
def test_every_send_is_waited_for_before_the_next_to_the_same_rank(schedule: str, v: int) -> None:
    for rank in play(schedule, 3, 6, v):
        sends = [action.peer for action in rank.actions if action.op == "SEND"]
        assert rank.link.log == {peer: ["send", "wait"] * sends.count(peer) for peer in sends}


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("v", [1, 2])
def test_forward_only_keeps_nothing(v: int, p: int) -> None:
    for rank in play("forward_only", p, 5, v):
        assert {graph for graph, _ in rank.live} == {0}
        assert all(ref() is None for chunk in rank.chunks.values() for ref in chunk.out.values())
        assert rank.reduced == []
        assert len(rank.results) == (5 if rank.last else 0)
        assert not any(x.requires_grad for result in rank.results for x in result.values())


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_results_and_gradients_are_those_of_one_process(schedule: str, v: int, p: int) -> None:
    weights, m = [weight(stage).requires_grad_() for stage in range(p * v)], 2 * p
    losses = []
    for number in range(m):
        x = tokens(number)
        for w in weights:
            x = (x @ w).sin() + 1
        losses.append(x.sum().detach())
        x.sum().backward()
    ranks = play(schedule, p, m, v)
    assert [len(rank.results) for rank in ranks] == [0] * (p - 1) + [m]
    assert [result.keys() for result in ranks[-1].results] == [{"loss", "largest"}] * m
    assert all(torch.equal(result["loss"], loss) for result, loss in zip(ranks[-1].results, losses))
    assert not any(x.requires_grad for result in ranks[-1].results for x in result.values())
    # every schedule sums the microbatches in the same order, so to the bit
    for rank in ranks:
        assert all(torch.equal(chunk.weight.grad, weights[s].grad) for s, chunk in rank.chunks.items())
        assert sorted(rank.reduced) == list(rank.chunks)
    for rank in play("forward_only", p, m, v)[-1:]:
        assert all(torch.equal(result["loss"], loss) for result, loss in zip(rank.results, losses))


# --- tuples ---------------------------------------------------------------------------------------------------------

NUMBERS = Spec((3,), torch.int64, torch.device("cpu"), gradient=False)
SCALES = Spec((2, 1), torch.float64, torch.device("cpu"), gradient=False)


class Coder(Chunk):
    """A stage of an encoder and a decoder: every decoder stage also hands the encoder's output on.

    Beside them travel integers and scales, of which no gradient travels.
    """

    def __init__(self, stage: int, stages: int, encoders: int) -> None:
        super().__init__(stage, stages, True)
        self.encoders = encoders
        shapes = [self.specs(s) for s in (stage, stage + 1)]
        self.arriving, self.leaving = shapes[0] if stage > 0 else (), () if self.last else shapes[1]

    def specs(self, stage: int) -> tuple[Spec, ...]:
        """What goes into a stage: a decoder after the first takes its own input beside the encoder's output."""
        return (HIDDEN, NUMBERS, SCALES, *[HIDDEN] * (stage > self.encoders))

    def forward(self, m: int, arrived: Values, deferred: Jobs | None) -> Values | dict[str, Tensor]:
        if not arrived:
            arrived = (tokens(m), torch.arange(3) + m, torch.full((2, 1), 1.0 + m, dtype=torch.float64))
        encoded, numbers, scales, *decoded = arrived
        assert numbers.tolist() == [m, m + 1, m + 2]
        assert not numbers.requires_grad
        assert not scales.requires_grad
        out = coder(self.stage, self.encoders, Product.apply, self.weight, encoded, scales, decoded, m, deferred)
        if self.last:
            return {"loss": out[-1].sum()}
        return out[0], numbers, scales, *out[1:]


def coder(
    stage: int,
    encoders: int,
    product: Callable[..., Tensor],
    weight: Tensor,
    encoded: Tensor,
    scales: Tensor,
    decoded: list[Tensor],
    m: int,
    *deferred: Jobs | None,
) -> tuple[Tensor, ...]:
    if stage < encoders:
        return ((product(encoded, weight, *deferred).sin() + encoded) * scales,)
    x = decoded[0] if decoded else tokens(50 + m)
    return encoded, product(x * encoded, weight, *deferred).sin() + x


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize(("schedule", "v"), TRAINING)
def test_tuples_pass_through_stages_and_gradients_are_summed(schedule: str, v: int, p: int) -> None:
    stages, m = p * v, 2 * p
    for encoders in range(stages + 1):
        weights = [weight(stage).requires_grad_() for stage in range(stages)]
        for number in range(m):
            scales, x, decoded = torch.full((2, 1), 1.0 + number, dtype=torch.float64), tokens(number), []
            for stage, w in enumerate(weights):
                x, *decoded = coder(stage, encoders, torch.matmul, w, x, scales, decoded, number)
            (decoded or [x])[-1].sum().backward()

        def main(world: ThreadWorld, encoders: int = encoders) -> dict[int, Chunk]:
            chunks = {s: Coder(s, stages, encoders) for s in range(world.rank, stages, p)}
            plan = lower(make_plan(schedule, p, m, v))
            execute(plan[world.rank], chunks, link=world, ranks=range(p), training=True)
            return chunks

        for chunks in run_threads(p, main, timeout_s=20):
            for stage, chunk in chunks.items():
                assert (chunk.weight.grad - weights[stage].grad).abs().max() < 1e-12 * weights[stage].grad.abs().max()


def test_a_value_that_a_stage_does_not_use_has_a_gradient_of_zeros() -> None:
    class Deaf(Chunk):
        def forward(self, m: int, arrived: Values, deferred: Jobs | None) -> Values | dict[str, Tensor]:
            if self.last:
                return {"loss": self.weight.sum()}
            return super().forward(m, arrived, deferred)

    def main(world: ThreadWorld) -> Tensor | None:
        chunk = Deaf(world.rank, 2, True)
        plan = lower(make_plan("1f1b", 2, 2))
        execute(plan[world.rank], {world.rank: chunk}, link=world, ranks=range(2), training=True, loss_scale=3.0)
        return chunk.weight.grad

    first, last = run_threads(2, main, timeout_s=20)
    assert torch.equal(first, torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(last, torch.full((3, 3), 6.0, dtype=torch.float64))


def test_an_action_it_does_not_know_is_refused() -> None:
    with pytest.raises(AssertionError, match="cannot run 0X0"):
        execute([Action(0, "X", 0)], {0: Chunk(0, 1, True)}, link=None, ranks=[0], training=True)
