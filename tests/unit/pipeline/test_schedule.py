"""Schedules: bubbles and live activations of the papers, over every small pipeline."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from plans import EVERY, PLAIN, fitting, idle_times, written

from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import (
    forward_only,
    gpipe,
    interleaved,
    make_plan,
    one_f_one_b,
    rank_of_stage,
    stages_of_rank,
    zb_h1,
)
from megalite.pipeline.simulate import Costs, check_complete, live_counts, simulate

ROOT = Path(__file__).resolve().parents[3]
PEAK: dict[str, Callable[[int, int, int], int]] = {
    "gpipe": lambda p, m, rank: m,
    "1f1b": lambda p, m, rank: min(p - rank, m),
    "forward_only": lambda p, m, rank: 1,
}


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


def test_the_tables_load_without_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import megalite.pipeline.lower, megalite.pipeline.draw; "
        "sys.exit(bool({'torch', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-I", "-c", code], timeout=60).returncode == 0
