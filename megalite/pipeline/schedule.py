"""Pipeline schedules as data: what every rank does, in which order, as plain lists.

A `Plan` holds one list of `Action`s per pipeline rank. Nothing here computes, communicates or imports
torch: `simulate` plays a plan on paper, `lower` adds the communication to it, the executor obeys it, so
what runs, what is predicted and what is drawn are the same lists.

Microbatches are numbered from 0 and every schedule runs the backwards of a stage in that order: gradients
are then summed in the same order under every schedule, and the sums agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one rank. `str` gives the short form of schedules: `2F1`, `2RECV_B1`, `2REDUCE`.

    A SEND and its RECV are named by the stage on whose rank they stand, so `1SEND_F0` (stage 1 gives its
    activation away) is met by `2RECV_F0` (stage 2 takes it as its input).
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


def gpipe(num_stages: int, num_microbatches: int) -> Plan:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe", sections 2.2 and 2.3).

    Bubble (p-1)/(m+p-1); every rank keeps all m activations. The paper's figure 2 runs the backwards last
    in, first out; here they run first in, first out, which costs the same and sums gradients as 1F1B does.
    """
    _refuse_below_one(num_stages, num_microbatches)
    microbatches = range(num_microbatches)
    return [[Action(s, op, m) for op in "FB" for m in microbatches] + [Action(s, "REDUCE")] for s in range(num_stages)]


def one_f_one_b(num_stages: int, num_microbatches: int) -> Plan:
    """Warmup forwards, then one forward and one backward in turn, then the backwards left over.

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2 (PipeDream-Flush). The bubble is GPipe's, (p-1)/(m+p-1), also when m < p, but rank r keeps
    only min(p-r, m) activations: its warmup is the p-r-1 forwards the ranks after it need to fill up.
    """
    _refuse_below_one(num_stages, num_microbatches)
    plan: Plan = []
    for s in range(num_stages):
        warmup = min(num_stages - s - 1, num_microbatches)
        actions = [Action(s, "F", m) for m in range(warmup)]
        for m in range(warmup, num_microbatches):
            actions += [Action(s, "F", m), Action(s, "B", m - warmup)]
        actions += [Action(s, "B", m) for m in range(num_microbatches - warmup, num_microbatches)]
        plan.append([*actions, Action(s, "REDUCE")])
    return plan


def forward_only(num_stages: int, num_microbatches: int) -> Plan:
    """Forwards alone, for evaluation and generation: nothing is kept, nothing is reduced."""
    _refuse_below_one(num_stages, num_microbatches)
    return [[Action(s, "F", m) for m in range(num_microbatches)] for s in range(num_stages)]


Schedule = Callable[[int, int], Plan]
SCHEDULES: Mapping[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""The schedules one can train with, by the name a user writes."""


def make_plan(name: str, num_stages: int, num_microbatches: int, schedules: Mapping[str, Schedule] = SCHEDULES) -> Plan:
    """The plan of the schedule called `name`.

    Raises ValueError, with the nearest name, for a name that `schedules` lacks, and for numbers below 1.
    """
    if name not in schedules:
        near = get_close_matches(name.lower(), schedules, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown schedule {name!r}: {hint}use one of {', '.join(schedules)}")
    return schedules[name](num_stages, num_microbatches)


def _refuse_below_one(num_stages: int, num_microbatches: int) -> None:
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages} is below 1; use 1 to train without a pipeline")
    if num_microbatches < 1:
        raise ValueError(
            f"num_microbatches={num_microbatches} is below 1; a step runs at least one microbatch, so "
            "global_batch_size must be at least micro_batch_size times the number of data-parallel ranks"
        )


def rank_of_stage(plan: Plan) -> dict[int, int]:
    """The rank on which each stage lives. Raises ValueError if a stage stands on two ranks."""
    ranks: dict[int, int] = {}
    for rank, actions in enumerate(plan):
        for action in actions:
            home = ranks.setdefault(action.stage, rank)
            if home != rank:
                raise ValueError(
                    f"{action} stands on rank {rank}, but stage {action.stage} lives on rank {home}: "
                    "a stage has one rank"
                )
    return ranks


def transfer(action: Action, ranks: Mapping[int, int]) -> tuple[Action, Action] | None:
    """The SEND and the RECV that take what `action` computes to the stage that needs it.

    None where nothing crosses ranks: at the ends of the pipeline, between two stages of one rank, and for
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
