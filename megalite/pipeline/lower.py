"""Lowering: put the communication into a plan, so that it cannot deadlock.

All ranks' actions are simulated once in a single global order of time, and every transfer takes one place in
that order: when its value is computed. Each rank's list is that order restricted to the rank's own actions, so
a transfer is projected onto both of its ranks.

Why this cannot deadlock, even if a send blocks until its receive is reached: suppose ranks were
stuck, and of all the steps not yet done (a transfer is one step of two ranks) look at the first in the
global order. Whatever it waits for comes before it in that order, so is done. Whatever precedes it in the
list of a rank that takes part comes before it in that order too, so is done: every rank it needs has
reached it. Nothing holds it, so the ranks were not stuck. This needs the order to be one order for all
ranks; it does not need the costs to be right, so real timing that differs makes a plan slower, never stuck.

A RECV may come earlier than the action that uses its value, never later. All transfers between two ranks,
in both directions together, come in the same order on both, so none needs a tag.
"""

from __future__ import annotations

from heapq import heappop, heappush

from megalite.pipeline.schedule import Action, Plan, rank_of_stage, transfer
from megalite.pipeline.simulate import DEFAULT_COSTS, TRANSFER, Costs, simulate


def lower(plan: Plan, costs: Costs = DEFAULT_COSTS) -> Plan:
    """`plan` with a SEND and a RECV for every value that crosses ranks; its other actions keep their order.

    `costs` say when each value is ready, and so how early its RECV comes. Raises Deadlock if the plan cannot
    complete, ValueError if it is lowered already.
    """
    if any(action.op in TRANSFER for actions in plan for action in actions):
        raise ValueError("the plan has SEND or RECV in it already; lower it only once")
    ranks = rank_of_stage(plan)
    lowered: Plan = [[] for _ in plan]
    computed: list[tuple[float, int, int, tuple[Action, Action]]] = []

    def project_until(time: float) -> None:
        while computed and computed[0][0] <= time:
            send, receive = heappop(computed)[3]
            lowered[ranks[send.stage]].append(send)
            lowered[ranks[receive.stage]].append(receive)

    for number, event in enumerate(simulate(plan, costs).events):
        # An action that uses a value starts no earlier than the value exists, so its RECV comes before it.
        project_until(event.start)
        lowered[event.rank].append(event.action)
        if pair := transfer(event.action, ranks):
            # At one moment the older microbatch goes first: the stages beyond wait for it sooner.
            heappush(computed, (event.end, event.action.microbatch, number, pair))
    return lowered
