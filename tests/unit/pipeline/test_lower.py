"""Lowering: where communication goes, and that no cost and no blocking send makes it deadlock."""

import random

import pytest
from plans import EVERY, fitting, written

from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import Action, Plan, gpipe, one_f_one_b, rank_of_stage
from megalite.pipeline.simulate import Costs, Deadlock, check_complete, simulate


def test_lowered_by_hand() -> None:
    lowered = lower(one_f_one_b(2, 2))
    assert written(lowered) == [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE",
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1 1REDUCE",
    ]
    assert lowered[0][1] == Action(0, "SEND", 0, of="F", peer=1)
    assert lowered[1][0] == Action(1, "RECV", 0, of="F", peer=0)
    with pytest.raises(ValueError, match="already"):
        lower(lowered)


@pytest.mark.parametrize("name", EVERY)
def test_lowering_holds_for_costs_it_did_not_know(name: str) -> None:
    draw = random.Random(0)
    for _ in range(40):
        p = draw.randint(2, 8)
        plan = EVERY[name](p, m := fitting(name, p, draw.randint(1, 12)))
        lowered = lower(plan, Costs(forward=draw.choice([0, 1, 3]), communication=0.5))
        check_complete(lowered, m)
        factors = tuple(draw.uniform(0.1, 9) for _ in rank_of_stage(plan))
        costs = Costs(backward=draw.uniform(0, 3), communication=draw.uniform(0, 3), stage_factors=factors)
        simulate(lowered, costs, blocking_sends=True)
        # Receives that are only posted take no time from the schedule.
        assert simulate(lowered, costs).makespan == simulate(plan, costs).makespan


def test_naive_communication_deadlocks_where_lowering_does_not() -> None:
    # Send what is computed, receive what is needed: in the steady state of 1F1B both ranks then send at once.
    lowered = lower(one_f_one_b(2, 3))
    naive: Plan = []
    for actions in lowered:
        receives = {(a.of, a.microbatch): a for a in actions if a.op == "RECV"}
        sends = {(a.of, a.microbatch): a for a in actions if a.op == "SEND"}
        computing = [a for a in actions if a.op in "FB"]
        triples = [(receives.get(k := (a.op, a.microbatch)), a, sends.get(k)) for a in computing]
        naive.append([action for triple in triples for action in triple if action])
    assert simulate(naive).makespan == 12
    with pytest.raises(Deadlock) as caught:
        simulate(naive, blocking_sends=True)
    assert str(caught.value).splitlines()[1:] == [
        "rank 0 waits at 0SEND_F1 for rank 1 to reach 1RECV_F1",
        "rank 1 waits at 1SEND_B0 for rank 0 to reach 0RECV_B0",
    ]


def test_incomplete_communication() -> None:
    rank0, rank1 = lower(gpipe(2, 1))
    receive, forward, *rest = rank1
    check_complete([rank0, rank1], 1)
    with pytest.raises(ValueError, match="1RECV_F0 is missing"):
        check_complete([rank0, [forward, *rest]], 1)
    late = [rank0, [forward, receive, *rest]]
    with pytest.raises(ValueError, match="1F0 comes before 1RECV_F0"):
        check_complete(late, 1)
    with pytest.raises(Deadlock, match="rank 1 waits at 1F0 for 1RECV_F0, which comes later in its own list"):
        simulate(late)
