"""Schedules, their simulation and their lowering: claims of the papers, checked over every small pipeline."""

import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from megalite.pipeline.draw import save_png, text_grid
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import (
    Action,
    Plan,
    forward_only,
    gpipe,
    interleaved,
    make_plan,
    one_f_one_b,
    rank_of_stage,
    stages_of_rank,
    zb_h1,
)
from megalite.pipeline.simulate import Costs, Deadlock, check_complete, live_counts, simulate

ROOT = Path(__file__).resolve().parents[3]
# those whose bubble is 1F1B's
PLAIN: dict[str, Callable[[int, int], Plan]] = {"gpipe": gpipe, "1f1b": one_f_one_b, "forward_only": forward_only}
PEAK: dict[str, Callable[[int, int, int], int]] = {
    "gpipe": lambda p, m, rank: m,
    "1f1b": lambda p, m, rank: min(p - rank, m),
    "forward_only": lambda p, m, rank: 1,
}
EVERY: dict[str, Callable[[int, int], Plan]] = {
    **PLAIN,
    "zb-h1": zb_h1,
    **{f"interleaved-{v}": partial(interleaved, chunks=v) for v in (2, 3, 4)},
}


def fitting(name: str, p: int, m: int) -> int:
    """`m`, or the next number of microbatches that the schedule runs on p ranks."""
    return -(-m // p) * p if name.startswith("interleaved") else m


def idle_times(plan: Plan, costs: Costs) -> list[float]:
    played = simulate(plan, costs)
    return [played.makespan - sum(e.end - e.start for e in timeline) for timeline in played.timelines]


def parse(text: str) -> list[Action]:
    """`0F1 0B1 0REDUCE` as actions."""
    actions = []
    for word in text.split():
        op = word.lstrip("0123456789").rstrip("0123456789")
        stage, microbatch = word.split(op)
        actions.append(Action(int(stage), op, int(microbatch or -1)))
    return actions


def written(plan: Plan) -> list[str]:
    return [" ".join(map(str, actions)) for actions in plan]


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("name", PLAIN)
def test_every_small_pipeline(name: str, p: int) -> None:
    for m in range(1, 33):
        plan = PLAIN[name](p, m)
        check_complete(plan, m)
        played = simulate(plan)
        # Both are correctly rounded quotients of whole numbers, so they are equal, not close.
        assert played.bubble == (p - 1) / (m + p - 1)
        assert played.peak_live == [PEAK[name](p, m, rank) for rank in range(p)]

        lowered = lower(plan)
        if m <= 8:  # what follows would fail too, this only says why; it is a fifth of the time
            check_complete(lowered, m)
        assert [[a for a in actions if a.op not in ("SEND", "RECV")] for actions in lowered] == plan
        for blocking_sends in (False, True):
            assert simulate(lowered, blocking_sends=blocking_sends).makespan == played.makespan


@pytest.mark.parametrize("name", PLAIN)
def test_the_bubble_depends_neither_on_costs_nor_on_m_reaching_p(name: str) -> None:
    for p, m in [(2, 1), (5, 3), (8, 1), (8, 7), (4, 8), (8, 32)]:
        for forward, backward in [(1, 1), (2, 1), (3, 7), (0.1, 0.3)]:
            played = simulate(PLAIN[name](p, m), Costs(forward, backward))
            assert played.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize("p", range(1, 9))
@pytest.mark.parametrize("v", [2, 3, 4])
def test_interleaving_idles_for_a_part_of_the_time(v: int, p: int) -> None:
    """Narayanan et al. 2021, section 2.2: (p-1)(f+b)/v on every rank, f and b of all chunks of a rank."""
    for m in range(p, 33, p):
        plan = interleaved(p, m, v)
        check_complete(plan, m)
        for forward, backward in [(1, 2), (0.3, 0.7)]:
            idle = idle_times(plan, Costs(forward, backward))
            assert idle == pytest.approx([(p - 1) * (forward + backward)] * p, abs=1e-9)
        assert simulate(plan).bubble == pytest.approx((p - 1) / (m * v + p - 1), abs=1e-12)
        for rank, actions in enumerate(plan):
            ahead = 2 * (p - rank - 1) + (v - 1) * p
            first = next(i for i, action in enumerate(actions) if action.op == "B")
            # the forward right before the first backward is the first of the steady state
            assert first == min(ahead + 1, m * v)
            assert simulate(plan).peak_live[rank] == min(ahead + 1, m * v)


@pytest.mark.parametrize("p", range(1, 9))
def test_zb_h1_fills_the_bubble_with_weight_gradients(p: int) -> None:
    """Qi et al. 2023, table 1: (p-1)(f+i-w) on every rank, at the memory of 1F1B's first rank on every rank."""
    for m in range(1, 33):
        plan = zb_h1(p, m)
        check_complete(plan, m)
        for f, i, w in [(1, 1, 1), (1, 1, 0.5), (1.3, 1.1, 0.9)]:
            costs = Costs(f, i + w, i, w)
            idle = idle_times(plan, costs)
            if m >= p:
                assert idle == pytest.approx([(p - 1) * (f + i - w)] * p, abs=1e-9)
            assert max(idle) <= max(idle_times(one_f_one_b(p, m), costs)) + 1e-9
        played = simulate(plan)
        assert played.peak_live == [min(p, m)] * p
        for rank, actions in enumerate(plan):
            counts = live_counts(actions)
            assert max(whole for (whole,), _ in counts) == min(p - rank, m)
            # a W follows its I by as many microbatches as there are ranks before
            assert m < p or max(kept for _, (kept,) in counts) == rank + 1


@pytest.mark.parametrize("name", EVERY)
def test_backwards_and_weight_gradients_come_in_the_order_of_the_microbatches(name: str) -> None:
    for p, m in [(1, 3), (2, 4), (4, 8), (3, 9), (5, 5)]:
        for rank, actions in enumerate(EVERY[name](p, fitting(name, p, m))):
            for stage in {action.stage for action in actions}:
                assert stage % p == rank
                for op in "BIW":
                    order = [a.microbatch for a in actions if (a.stage, a.op) == (stage, op)]
                    assert order == sorted(order)


def test_forwards_alone_run_any_number_of_microbatches_through_the_chunks() -> None:
    for p, m, v in [(1, 3, 2), (2, 1, 3), (3, 7, 2), (4, 6, 3), (4, 32, 2)]:
        plan = forward_only(p, m, v)
        check_complete(plan, m)
        homes = rank_of_stage(plan)
        assert all(homes[s] == rank for rank in range(p) for s in stages_of_rank(rank, p, v))
        assert simulate(lower(plan), blocking_sends=True).peak_live == [1] * p
        if m % p == 0:
            assert simulate(plan).bubble == pytest.approx((p - 1) / (m * v + p - 1), abs=1e-12)


def test_what_a_rank_keeps_is_counted_by_stage() -> None:
    assert live_counts(parse("0F0 0I0 0F1 0I1 0W0 0W1 0REDUCE")) == [((0,), (2,)), ((1,), (1,))]
    assert live_counts(parse("0F0 2F0 0F1 2B0 2F1 0B0 2B1 0B1")) == [((2, 1), (0, 0))]
    assert live_counts(parse("0F0 0F1")) == [((1,), (0,))]
    assert live_counts([]) == []


def test_1f1b_by_hand() -> None:
    assert written(one_f_one_b(4, 8)) == [
        "0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7 0REDUCE",
        "1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7 1REDUCE",
        "2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7 2REDUCE",
        "3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7 3REDUCE",
    ]


def test_the_others_by_hand() -> None:
    assert written(gpipe(2, 3)) == ["0F0 0F1 0F2 0B0 0B1 0B2 0REDUCE", "1F0 1F1 1F2 1B0 1B1 1B2 1REDUCE"]
    assert written(forward_only(2, 3)) == ["0F0 0F1 0F2", "1F0 1F1 1F2"]
    assert written(one_f_one_b(3, 1)) == ["0F0 0B0 0REDUCE", "1F0 1B0 1REDUCE", "2F0 2B0 2REDUCE"]


def test_interleaved_and_zb_h1_by_hand() -> None:
    assert written(interleaved(2, 2, 2)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1 2REDUCE 0REDUCE",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 3REDUCE 1REDUCE",
    ]
    assert written(interleaved(1, 2, 2)) == ["0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1 1REDUCE 0REDUCE"]
    assert written(zb_h1(3, 4)) == [
        "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3 0REDUCE",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3 1REDUCE",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3 2REDUCE",
    ]


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


def test_refusals_name_a_remedy() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'zzz': use one of 1f1b, gpipe, zb-h1, interleaved"):
        make_plan("zzz", 2, 2)
    with pytest.raises(ValueError, match="num_ranks=0 is below 1; use 1"):
        make_plan("1f1b", 0, 2)
    with pytest.raises(ValueError, match="chunks=0 is below 1"):
        make_plan("1f1b", 2, 2, 0)
    with pytest.raises(ValueError, match="num_microbatches=0 is below 1"):
        make_plan("gpipe", 2, 0)
    with pytest.raises(ValueError, match=r"groups of 4.*6 is not a multiple of 4; use 4 or 8 microbatches"):
        make_plan("interleaved", 4, 6, 2)
    with pytest.raises(ValueError, match="zb-h1 runs one chunk a rank, not chunks=2; use chunks=1, or interleaved"):
        make_plan("zb-h1", 2, 2, 2)


def test_text_grid() -> None:
    played = simulate(one_f_one_b(2, 2))
    assert text_grid(played).splitlines() == [
        "time    0              5",
        "rank 0  F0 F1 .  .  B0--- .  B1---",
        "rank 1  .  F0 B0--- F1 B1--- .  .",
    ]
    wrapped = text_grid(played, width=24).splitlines()
    assert wrapped[:2] == ["time    0", "rank 0  F0 F1 .  .  B0-"]
    assert wrapped[4:6] == ["time    5", "rank 0  -- .  B1---"]
    assert text_grid(simulate(interleaved(2, 2, 2))).splitlines()[1:] == [
        "rank 0  F0  F1  F0' F1' .   .   B0'---- .   B1'---- B0----- B1-----",
        "rank 1  .   F0  F1  F0' B0'---- F1' B1'---- B0----- B1----- .   .",
    ]
    assert "\x1b[" in text_grid(played, colour=True)
    # The unit follows the costs: microseconds, or odd ones, give no wider a grid.
    assert len(text_grid(simulate(one_f_one_b(2, 2), Costs(1000, 2000))).splitlines()[1]) == 34
    assert "F0 F1 .  .  B0--- .  B1---" in text_grid(simulate(one_f_one_b(2, 2), Costs(0.37, 0.81)))
    assert len(text_grid(simulate(gpipe(2, 2), Costs(1e-9, 1)))) < 100_000
    text_grid(simulate(gpipe(2, 2), Costs(0, 0)))


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    save_png(simulate(one_f_one_b(4, 8)), tmp_path / "1f1b.png", "1f1b")
    assert (tmp_path / "1f1b.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install megalite\[plot\]"):
        save_png(simulate(gpipe(1, 1)), tmp_path / "none.png", "")


def tool(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(ROOT / "tools" / "schedule.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")


def test_the_tool() -> None:
    shown = tool("1f1b", "--stages", "4", "--microbatches", "8", "--lowered")
    assert shown.returncode == 0
    assert "bubble    27.27%; 1F1B's (p-1)/(m+p-1) = 27.27%" in shown.stdout
    assert "peak live activations, by rank  4 3 2 1" in shown.stdout
    assert "no deadlock, makespan 33" in shown.stdout
    chunked = tool("interleaved", "--stages", "4", "--microbatches", "8", "--chunks", "2", "--lowered")
    assert "bubble    15.79%; 1F1B's (p-1)/(m+p-1) = 27.27%" in chunked.stdout
    assert "peak live activations, by rank  11 9 7 5" in chunked.stdout
    split = tool("zb-h1", "--stages", "4", "--microbatches", "8", "--backward-cost", "4", "--forward-cost", "2")
    assert "makespan  54\nbubble    11.11%" in split.stdout
    for mistake in (
        ["gpipe", "--stages", "two", "--microbatches", "2"],
        ["forward", "--stages", "2", "--microbatches", "2"],
        ["interleaved", "--stages", "2", "--microbatches", "3", "--chunks", "2"],
        ["interleaved", "--stages", "2", "--microbatches", "4"],
        ["gpipe", "--stages", "2", "--microbatches", "2", "--png", "/no/such/folder/x.png"],
    ):
        refused = tool(*mistake)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1


def test_the_tables_load_without_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import megalite.pipeline.lower, megalite.pipeline.draw; "
        "sys.exit(bool({'torch', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-I", "-c", code], timeout=60).returncode == 0
