"""Simulate a plan: when every action runs, how long the pipeline idles, which activations stay alive.

A plan is a graph. An action waits for the previous one of its rank and for its inputs: a forward F(s, m) for
F(s-1, m), a backward B(s, m) (or I) for F(s, m) and B(s+1, m), a weight gradient W(s, m) for I(s, m). The
simulation walks that graph in order of time; a deadlock is a cycle in it.

In a lowered plan (see `lower`) a value reaches another rank through SEND and RECV instead. By default both
return at once, as isend and irecv do, and the action that uses the value waits for it to arrive. With
`blocking_sends` they are a rendezvous: each rank waits until the other has reached its half. No real transport
waits for more than that, so a plan that completes with blocking sends deadlocks on none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from megalite.pipeline.schedule import Action, Plan, rank_of_stage, transfer

COMPUTE = ("F", "B", "I", "W")
TRANSFER = ("SEND", "RECV")


class Deadlock(ValueError):
    """Ranks wait for each other, or for an action that no rank runs; the text names each and its reason."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What actions cost, in any one unit of time; a REDUCE only waits for work under way and costs nothing.

    Raises ValueError for a cost that is negative or not finite.
    """

    forward: float = 1
    backward: float = 2
    input_gradient: float = 1
    weight_gradient: float = 1
    communication: float = 0
    """From the end of an action until another rank has what it computed."""
    stage_factors: tuple[float, ...] = ()
    """One factor per stage for its computation, for stages of unequal size; empty means all 1."""

    def __post_init__(self) -> None:
        names = ("forward", "backward", "input_gradient", "weight_gradient", "communication")
        costs = [(name, getattr(self, name)) for name in names]
        for name, cost in costs + [("stage_factors", factor) for factor in self.stage_factors]:
            if not (math.isfinite(cost) and cost >= 0):
                raise ValueError(f"{name}={cost} is not a cost; use a finite number, 0 or more")

    def of(self, action: Action) -> float:
        """How long `action` keeps its rank computing."""
        if action.op not in COMPUTE:
            return 0
        op_costs = (self.forward, self.backward, self.input_gradient, self.weight_gradient)
        cost = op_costs[COMPUTE.index(action.op)]
        if not self.stage_factors:
            return cost
        if action.stage >= len(self.stage_factors):
            raise ValueError(
                f"stage_factors has {len(self.stage_factors)} numbers but the plan has a stage "
                f"{action.stage}; give one factor per stage"
            )
        return cost * self.stage_factors[action.stage]


DEFAULT_COSTS = Costs()


class Event(NamedTuple):
    """One action, from `start` to `end` in the unit of the costs."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """The result of `simulate`."""

    events: list[Event]
    """Every action of every rank in one global order: by start, and never before what it waits for."""
    timelines: list[list[Event]]
    """The same events by rank, in the order of the rank's list."""
    makespan: float
    """When the last action ends."""
    bubble: float
    """Fraction of all ranks' time spent not computing: idle / (p * makespan). Narayanan et al. 2021 divide by
    the time without idling instead, and so write (p-1)/m where this is (p-1)/(m+p-1)."""
    peak_live: list[int]
    """Per rank, the most activations it keeps at one time, each of one microbatch on one of its stages: from F until B,
    or until W where the backward is split. `live_counts` tells them apart."""


def simulate(plan: Plan, costs: Costs = DEFAULT_COSTS, blocking_sends: bool = False) -> Simulation:
    """Simulate `plan`, lowered or not, with the given costs.

    Raises Deadlock if some action never gets its inputs, ValueError if an action is listed twice or
    `costs.stage_factors` is too short.
    """
    graph = _Graph(plan, costs, blocking_sends)
    ends: dict[Action, float] = {}
    events: list[Event] = []
    timelines: list[list[Event]] = [[] for _ in plan]
    ready: list[tuple[float, int]] = []
    waiting: dict[Action, list[int]] = {}

    def reach(rank: int) -> None:
        """Queue the rank's next action, or leave the rank waiting for the first thing that is missing."""
        timeline = timelines[rank]
        if len(timeline) == len(plan[rank]):
            return
        start = timeline[-1].end if timeline else 0
        for needed, lag in graph.needs(plan[rank][len(timeline)]):
            end = ends.get(needed)
            if end is None:
                waiting.setdefault(needed, []).append(rank)
                return
            start = max(start, end + lag)
        heappush(ready, (start, rank))

    for rank in range(len(plan)):
        reach(rank)
    while ready:
        start, rank = heappop(ready)
        action = plan[rank][len(timelines[rank])]
        meets = graph.rendezvous and action.op in TRANSFER
        event = Event(rank, action, start, start + (costs.communication if meets else costs.of(action)))
        events.append(event)
        timelines[rank].append(event)
        ends[action] = event.end
        for waiter in (rank, *waiting.pop(action, ())):
            reach(waiter)

    if waiting:
        stuck = {rank: needed for needed, ranks in waiting.items() for rank in ranks}
        reasons = [graph.reason(rank, len(timelines[rank]), stuck[rank]) for rank in sorted(stuck)]
        raise Deadlock("\n".join([f"deadlock: {len(stuck)} of {len(plan)} ranks wait forever", *reasons]))
    makespan = max((event.end for event in events), default=0)
    busy = sum(costs.of(event.action) for event in events)
    area = len(plan) * makespan
    peaks = [max((sum(whole) + sum(kept) for whole, kept in live_counts(actions)), default=0) for actions in plan]
    return Simulation(events, timelines, makespan, (area - busy) / area if area else 0.0, peaks)


def check_complete(plan: Plan, num_microbatches: int) -> None:
    """Check that every stage does each of its actions once, on one rank, and after what it needs there.

    That is F for every microbatch and, unless the plan has no backward at all, B (or I and W) for every
    microbatch and one REDUCE at the end; in a lowered plan every SEND and RECV too. Raises ValueError.
    """
    graph = _Graph(plan, DEFAULT_COSTS)
    trains = any(action.op in ("B", "I", "W", "REDUCE") for action in graph.places)
    wanted: set[Action] = set()
    for stage in range(graph.last_stage + 1):
        for m in range(num_microbatches):
            split = graph.splits and Action(stage, "B", m) not in graph.places
            backward = ("IW" if split else "B") if trains else ""
            wanted.update(Action(stage, op, m) for op in "F" + backward)
        if trains:
            wanted.add(Action(stage, "REDUCE"))
    if graph.lowered:
        wanted.update(*filter(None, [transfer(action, graph.ranks) for action in wanted]))
    wrong = [f"{action} is missing" for action in wanted - graph.places.keys()]
    wrong += [f"{action} is unexpected" for action in graph.places.keys() - wanted]
    for rank, actions in enumerate(plan):
        done: set[Action] = set()
        for action in actions:
            late = [n for n, _ in graph.needs(action) if n not in done and graph.runs_on(rank, n)]
            wrong += [f"{action} comes before {needed}" for needed in late]
            if Action(action.stage, "REDUCE") in done:
                wrong.append(f"{action} comes after {action.stage}REDUCE")
            done.add(action)
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"the plan is not complete: {', '.join(sorted(wrong)[:8])}{more}")


class _Graph:
    """What each action of a plan waits for, besides the action before it on its rank."""

    def __init__(self, plan: Plan, costs: Costs, blocking_sends: bool = False) -> None:
        self.plan, self.costs = plan, costs
        self.ranks = rank_of_stage(plan)
        self.last_stage = max(self.ranks, default=-1)
        self.places: dict[Action, tuple[int, int]] = {}
        for rank, actions in enumerate(plan):
            for index, action in enumerate(actions):
                if self.places.setdefault(action, (rank, index)) != (rank, index):
                    raise ValueError(f"{action} is listed twice on rank {rank}")
        self.lowered = any(action.op in TRANSFER for action in self.places)
        self.splits = any(action.op == "I" for action in self.places)
        self.rendezvous = self.lowered and blocking_sends

    def needs(self, action: Action) -> Iterator[tuple[Action, float]]:
        """The actions that must have ended, each with the time that must have passed since."""
        stage, m = action.stage, action.microbatch
        if action.op == "SEND":
            yield self._maker(stage, action.of, m), 0
        if action.op in TRANSFER and self.rendezvous:
            # The other side is there as soon as it is done with what precedes its half of the transfer.
            partner = self._partner(action)
            rank, index = self.places.get(partner, (0, -1))
            if index != 0:
                yield self.plan[rank][index - 1] if index > 0 else partner, 0
        if action.op == "W":
            yield Action(stage, "I", m), 0
        if action.op in ("B", "I"):
            yield Action(stage, "F", m), 0
        if action.op in ("B", "I") and stage < self.last_stage:
            yield from self._arrival(action, "B", stage + 1)
        if action.op == "F" and stage > 0:
            yield from self._arrival(action, "F", stage - 1)

    def runs_on(self, rank: int, action: Action) -> bool:
        return self.places.get(action, (-1, 0))[0] == rank

    def reason(self, rank: int, index: int, needed: Action) -> str:
        """Why `rank` cannot run its action number `index`."""
        action = self.plan[rank][index]
        if needed not in self.places:
            what = f"{needed}, which no rank runs"
        elif self.runs_on(rank, needed):
            what = f"{needed}, which comes later in its own list"
        elif action.op in TRANSFER:
            what = f"rank {action.peer} to reach {self._partner(action)}"
        else:
            of = needed.of or ("F" if needed.op == "F" else "B")
            kind = "activation" if of == "F" else "gradient"
            what = f"the {kind} of {needed.stage}{of}{needed.microbatch} from rank {self.places[needed][0]}"
        return f"rank {rank} waits at {action} for {what}"

    def _maker(self, stage: int, of: str, microbatch: int) -> Action:
        """The action that computes an activation or a gradient; where the backward is split, that is I."""
        if of == "B" and self.splits and Action(stage, "I", microbatch) in self.places:
            of = "I"
        return Action(stage, of, microbatch)

    def _partner(self, action: Action) -> Action:
        """The RECV that meets a SEND, or the other way round."""
        step = 1 if (action.op == "SEND") == (action.of == "F") else -1
        op = "RECV" if action.op == "SEND" else "SEND"
        return Action(action.stage + step, op, action.microbatch, action.of, self.ranks[action.stage])

    def _arrival(self, action: Action, of: str, source: int) -> Iterator[tuple[Action, float]]:
        """What must have ended before `action` has the activation or gradient of stage `source`."""
        m, here, there = action.microbatch, self.ranks[action.stage], self.ranks.get(source)
        if not self.lowered or there is None or there == here:
            yield self._maker(source, of, m), 0 if there == here else self.costs.communication
            return
        yield Action(action.stage, "RECV", m, of, there), 0
        if not self.rendezvous:
            yield Action(source, "SEND", m, of, here), self.costs.communication


def live_counts(actions: list[Action]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What one rank keeps, where it keeps most: (whole, kept), each one count per stage of the rank in their order.

    `whole`: microbatches between F and B (or I), whose activations are all alive; `kept`: microbatches between I and W,
    of which only what the weight gradients need is. Counts that another pair exceeds nowhere below are left out, so the
    rank's peak in bytes is the largest of these pairs whatever an activation costs on each stage.
    """
    stages = sorted({action.stage for action in actions})
    place = {stage: i for i, stage in enumerate(stages)}
    ends = {(action.stage, action.microbatch) for action in actions if action.op in ("B", "W")}
    counts = [0] * (2 * len(stages))
    seen: set[tuple[int, ...]] = set()
    for action in actions:
        whole, kept = place.get(action.stage, 0), place.get(action.stage, 0) + len(stages)
        if action.op == "F":
            counts[whole] += 1
            seen.add(tuple(counts))
            # without a backward to come an activation is dropped as soon as it is sent on
            counts[whole] -= (action.stage, action.microbatch) not in ends
        elif action.op in ("B", "I"):
            counts[whole] -= 1
            counts[kept] += action.op == "I"
            seen.add(tuple(counts))
        elif action.op == "W":
            counts[kept] -= 1
    largest = [a for a in seen if not any(a != b and all(x <= y for x, y in zip(a, b)) for b in seen)]
    return [(a[: len(stages)], a[len(stages) :]) for a in sorted(largest)]
