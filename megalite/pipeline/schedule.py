"""Pipeline schedules as data: what every rank does, in which order, as plain lists.

A `Plan` holds one list of `Action`s per pipeline rank. Nothing here computes, communicates or imports
torch: `simulate` plays a plan on paper, `lower` adds the communication to it, the executor obeys it, so
what runs, what is predicted and what is drawn are the same lists. A new schedule is a function that returns
a plan, and a row of `SCHEDULES`.

A rank holds one stage, or with v chunks v of them: stage c·p + r is chunk c of rank r. Microbatches are
numbered from 0 and every schedule runs the backwards of a stage (and, split, its weight gradients) in that
order: gradients are then summed in the same order under every schedule, and the sums agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one rank. `str` gives the short form of schedules: `2F1`, `2RECV_B1`, `2REDUCE`.

    A SEND and its RECV are each named by the stage on whose rank they run, so `1SEND_F0` (stage 1 sends its
    activation) is met by `2RECV_F0` (stage 2 receives it as its input).
    """

    stage: int
    """Global stage number."""
    op: str
    """`F` forward, `B` whole backward, `SEND`, `RECV`, `REDUCE` (of the stage's gradients over its replicas);
    `I` input gradient and `W` weight gradient, the halves of a backward (Qi et al. 2023, "Zero Bubble
    Pipeline Parallelism", section 2)."""
    microbatch: int = -1
    """Number of the microbatch; -1 for REDUCE."""
    of: str = ""
    """SEND and RECV only: `F` an activation, `B` a gradient (whether a `B` or an `I` computed it)."""
    peer: int = -1
    """SEND and RECV only: the other pipeline rank."""

    def __str__(self) -> str:
        of = f"_{self.of}" if self.of else ""
        return f"{self.stage}{self.op}{of}{self.microbatch if self.microbatch >= 0 else ''}"


Plan = list[list[Action]]
"""One list of actions per pipeline rank, each in the order in which the rank runs it."""


def stages_of_rank(rank: int, num_ranks: int, chunks: int) -> range:
    """The stages on one rank, by chunk."""
    return range(rank, num_ranks * chunks, num_ranks)


def gpipe(num_ranks: int, num_microbatches: int) -> Plan:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe", sections 2.2 and 2.3).

    Bubble (p-1)/(m+p-1); every rank keeps all m activations. The paper's figure 2 runs the backwards last
    in, first out; here they run first in, first out, which costs the same and sums gradients as 1F1B does.
    """
    microbatches = range(num_microbatches)
    return [[Action(s, op, m) for op in "FB" for m in microbatches] + [Action(s, "REDUCE")] for s in range(num_ranks)]


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Plan:
    """Warmup forwards, then one forward and one backward in turn, then the backwards left over.

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2 (PipeDream-Flush). The bubble is GPipe's, (p-1)/(m+p-1), also when m < p, but rank r keeps
    only min(p-r, m) activations: its warmup is the p-r-1 forwards the ranks after it need to fill up.
    """
    plan: Plan = []
    for s in range(num_ranks):
        warmup = min(num_ranks - s - 1, num_microbatches)
        actions = [Action(s, "F", m) for m in range(warmup)]
        for m in range(warmup, num_microbatches):
            actions += [Action(s, "F", m), Action(s, "B", m - warmup)]
        actions += [Action(s, "B", m) for m in range(num_microbatches - warmup, num_microbatches)]
        plan.append([*actions, Action(s, "REDUCE")])
    return plan


def interleaved(num_ranks: int, num_microbatches: int, chunks: int = 2) -> Plan:
    """1F1B over several chunks a rank (Narayanan et al. 2021, section 2.2, figure 4).

    Microbatches run in groups of p: for each group, each chunk takes all of the group; backward the same with the
    chunks reversed. Bubble (p-1)/(m·v+p-1), a v-th of 1F1B's idle time; rank r keeps at most
    min(2(p-r-1)+(v-1)p+1, m·v) activations, each of one chunk. Raises ValueError if p does not divide m.
    """
    p, m, v = num_ranks, num_microbatches, chunks
    if m % p:
        raise ValueError(
            f"interleaved runs microbatches in groups of {p}, one for each rank, and {m} is not a multiple of {p}; "
            f"use {m // p * p or p} or {-(-m // p) * p} microbatches"
        )
    plan: Plan = []
    for rank in range(p):
        steps = [(chunk, group + i) for group in range(0, m, p) for chunk in range(v) for i in range(p)]
        forwards = [Action(chunk * p + rank, "F", i) for chunk, i in steps]
        backwards = [Action((v - 1 - chunk) * p + rank, "B", i) for chunk, i in steps]
        warmup = min(2 * (p - rank - 1) + (v - 1) * p, m * v)
        actions = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards):
            actions += [forward, backward]
        actions += backwards[m * v - warmup :]
        plan.append([*actions, *(Action(s, "REDUCE") for s in reversed(stages_of_rank(rank, p, v)))])
    return plan


def zb_h1(num_ranks: int, num_microbatches: int) -> Plan:
    """1F1B whose weight gradients wait until there is nothing else to do (Qi et al. 2023, section 3, ZB-H1).

    On rank r a W follows its I by r microbatches. In units of one microbatch's forward f, input gradient i and weight
    gradient w each rank idles for (p-1)(f+i-w) if w <= i and m >= p, beside 1F1B's (p-1)(f+i+w). Each rank keeps at
    most min(p, m) microbatches, of which those between I and W only what the weight gradients need.
    """
    plan: Plan = []
    for rank in range(num_ranks):
        warmup, done = min(num_ranks - rank - 1, num_microbatches), 0
        actions = [Action(rank, "F", m) for m in range(warmup)]
        for m in range(num_microbatches):
            if m + warmup < num_microbatches:
                actions.append(Action(rank, "F", m + warmup))
            actions.append(Action(rank, "I", m))
            # after the last forward each I waits for the next rank, and a W fills the gap
            if m - rank >= done or m + warmup >= num_microbatches:
                actions.append(Action(rank, "W", done))
                done += 1
        actions += [Action(rank, "W", m) for m in range(done, num_microbatches)]
        plan.append([*actions, Action(rank, "REDUCE")])
    return plan


def forward_only(num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """Forwards alone, for evaluation and generation: nothing is kept, nothing is reduced.

    With several chunks microbatches run in groups of p, as in `interleaved`, but the last group may be smaller.
    """
    _require_one(num_ranks, num_microbatches, chunks)
    p, m = num_ranks, num_microbatches
    plan: Plan = []
    for rank in range(p):
        stages = stages_of_rank(rank, p, chunks)
        groups = (range(first, min(first + p, m)) for first in range(0, m, p))
        plan.append([Action(s, "F", i) for group in groups for s in stages for i in group])
    return plan


PLANS: Mapping[str, Callable[[int, int], Plan]] = {"1f1b": one_f_one_b, "gpipe": gpipe, "zb-h1": zb_h1}
CHUNKED_PLANS: Mapping[str, Callable[[int, int, int], Plan]] = {"interleaved": interleaved}
"""The schedules one can train with, by the names that `megalite/config/schedules.py` describes: plan(num_ranks,
num_microbatches), or with several chunks a rank plan(num_ranks, num_microbatches, chunks)."""


def make_plan(name: str, num_ranks: int, num_microbatches: int, chunks: int = 1) -> Plan:
    """The plan of the schedule called `name`.

    Raises ValueError for an unknown name, for numbers below 1, and for chunks or microbatches that the schedule cannot
    run with.
    """
    if name not in (*PLANS, *CHUNKED_PLANS):
        raise ValueError(f"unknown schedule {name!r}: use one of {', '.join([*PLANS, *CHUNKED_PLANS])}")
    _require_one(num_ranks, num_microbatches, chunks)
    if name in CHUNKED_PLANS:
        return CHUNKED_PLANS[name](num_ranks, num_microbatches, chunks)
    if chunks > 1:
        chunked = " or ".join(CHUNKED_PLANS)
        raise ValueError(f"schedule {name} runs one chunk a rank, not chunks={chunks}; use chunks=1, or {chunked}")
    return PLANS[name](num_ranks, num_microbatches)


def _require_one(num_ranks: int, num_microbatches: int, chunks: int) -> None:
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} is below 1; use 1 to train without a pipeline")
    if chunks < 1:
        raise ValueError(f"chunks={chunks} is below 1; use 1 for one stage a rank")
    if num_microbatches < 1:
        raise ValueError(
            f"num_microbatches={num_microbatches} is below 1; a step runs at least one microbatch, so "
            "global_batch_size must be at least micro_batch_size times the number of data-parallel ranks"
        )


def rank_of_stage(plan: Plan) -> dict[int, int]:
    """The rank of each stage. Raises ValueError if a stage is on two ranks."""
    ranks: dict[int, int] = {}
    for rank, actions in enumerate(plan):
        for action in actions:
            home = ranks.setdefault(action.stage, rank)
            if home != rank:
                raise ValueError(
                    f"{action} is on rank {rank}, but stage {action.stage} is on rank {home}: a stage has one rank"
                )
    return ranks


def transfer(action: Action, ranks: Mapping[int, int]) -> tuple[Action, Action] | None:
    """The SEND and the RECV that carry the result of `action` to the stage that needs it.

    None if nothing crosses ranks: at the ends of the pipeline, between two stages of one rank, and for
    actions without an output. `ranks` is `rank_of_stage` of the plan.
    """
    if action.op not in ("F", "B", "I"):
        return None
    of, step = ("F", 1) if action.op == "F" else ("B", -1)
    here, there = ranks.get(action.stage), ranks.get(action.stage + step)
    if here is None or there is None or here == there:
        return None
    send = Action(action.stage, "SEND", action.microbatch, of, there)
    return send, Action(action.stage + step, "RECV", action.microbatch, of, here)
