"""The simulation: time, live activations, deadlocks, and which plans are complete."""

import pytest
from plans import parse

from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import forward_only, gpipe, one_f_one_b
from megalite.pipeline.simulate import Costs, Deadlock, check_complete, live_counts, simulate


def test_what_a_rank_keeps_is_counted_by_stage() -> None:
    assert live_counts(parse("0F0 0I0 0F1 0I1 0W0 0W1 0REDUCE")) == [((0,), (2,)), ((1,), (1,))]
    assert live_counts(parse("0F0 2F0 0F1 2B0 2F1 0B0 2B1 0B1")) == [((2, 1), (0, 0))]
    assert live_counts(parse("0F0 0F1")) == [((1,), (0,))]
    assert live_counts([]) == []


def test_what_crosses_ranks_takes_time() -> None:
    assert simulate(forward_only(3, 1), Costs(communication=0.5)).makespan == 4
    assert simulate(gpipe(2, 1), Costs(communication=0.5)).makespan == 7
    blocked = simulate(lower(gpipe(2, 1)), Costs(communication=0.5), blocking_sends=True)
    assert blocked.timelines[0][1].start == 1
    assert blocked.timelines[0][1].end == 1.5


def test_an_unbalanced_stage_sets_the_pace() -> None:
    played = simulate(one_f_one_b(2, 4), Costs(stage_factors=(1, 2)))
    assert played.makespan == 1 + 4 * 6 + 2
    assert played.bubble == (2 * 27 - 4 * 3 - 4 * 6) / (2 * 27)
    with pytest.raises(ValueError, match="one factor per stage"):
        simulate(one_f_one_b(3, 4), Costs(stage_factors=(1, 2)))
    with pytest.raises(ValueError, match="backward=-1"):
        Costs(backward=-1)


def test_a_split_backward_keeps_its_activation_until_the_weight_gradient() -> None:
    plan = [
        parse("0F0 0F1 0I0 0F2 0W0 0I1 0W1 0I2 0W2 0REDUCE"),
        parse("1F0 1I0 1F1 1I1 1F2 1I2 1W0 1W1 1W2 1REDUCE"),
    ]
    check_complete(plan, 3)
    lowered = lower(plan)
    check_complete(lowered, 3)
    assert simulate(plan).peak_live == [3, 3]
    assert simulate(lowered, blocking_sends=True).peak_live == [3, 3]
    with pytest.raises(ValueError, match="1W2 is missing"):
        check_complete([plan[0], [a for a in plan[1] if str(a) != "1W2"]], 3)


def test_two_stages_on_one_rank() -> None:
    plan = [
        parse("0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1 0REDUCE 2REDUCE"),
        parse("1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 1REDUCE 3REDUCE"),
    ]
    check_complete(plan, 2)
    lowered = lower(plan)
    check_complete(lowered, 2)
    assert simulate(lowered, blocking_sends=True).makespan == simulate(plan).makespan
    one_rank = [parse("0F0 1F0 1B0 0B0")]
    assert lower(one_rank) == one_rank


def test_a_deadlock_is_told_rank_by_rank() -> None:
    plan = [parse("0F0 0F1 0B1 0B0"), parse("1F0 1B1 1F1 1B0")]
    with pytest.raises(Deadlock) as caught:
        simulate(plan)
    assert str(caught.value).splitlines() == [
        "deadlock: 2 of 2 ranks wait forever",
        "rank 0 waits at 0B1 for the gradient of 1B1 from rank 1",
        "rank 1 waits at 1B1 for 1F1, which comes later in its own list",
    ]
    with pytest.raises(Deadlock, match="rank 1 waits at 1F0 for 0F0, which no rank runs"):
        simulate([parse("0F1"), parse("1F0")])
    with pytest.raises(Deadlock, match="rank 1 waits at 1F0 for the activation of 0F0 from rank 0"):
        simulate([parse("0W0 0F0"), parse("1F0")])


@pytest.mark.parametrize(
    ("lists", "fault"),
    [
        (["0F0 0B0 0REDUCE", "1F0 1REDUCE"], "1B0 is missing"),
        (["0F0 0B0 0REDUCE", "1F0 1B0 1F0 1REDUCE"], "1F0 is listed twice on rank 1"),
        (["0F0 0B0 0REDUCE", "1F0 1B0 1F1 1B1 1REDUCE"], "1B1 is unexpected, 1F1 is unexpected"),
        (["0F0 0B0 0REDUCE", "1B0 1F0 1REDUCE"], "1B0 comes before 1F0"),
        (["0F0 0B0 1B0 0REDUCE", "1F0 1REDUCE"], "1F0 is on rank 1, but stage 1 is on rank 0"),
        (["0F0 0B0 0REDUCE", "1F0 1B0"], "1REDUCE is missing"),
        (["0F0 0B0 0REDUCE", "1F0 1REDUCE 1B0"], "1B0 comes after 1REDUCE"),
        (["0F0 0B0 0REDUCE", "1F0 1B0 1I0 1W0 1REDUCE"], "1I0 is unexpected, 1W0 is unexpected"),
        (["0F0", "2F0"], "1F0 is missing"),
    ],
)
def test_incomplete_plans(lists: list[str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        check_complete([parse(actions) for actions in lists], 1)
