"""What is forecast from short runs is what the whole schedule does."""

import time

import pytest

from megalite.config.schedules import SCHEDULES
from megalite.pipeline.forecast import bubble, peak_bytes
from megalite.pipeline.schedule import make_plan
from megalite.pipeline.simulate import live_counts, simulate


def cases(name: str) -> list[tuple[int, int, int]]:
    """(ranks, microbatches, chunks) from less than the pipeline holds to far more."""
    chunked = SCHEDULES[name].chunked
    return [
        (p, groups * p if chunked else max(1, groups * p - 1), v)
        for p in (1, 2, 3, 4, 7)
        for groups in (1, 2, 3, 4, 9)
        for v in ((2, 3) if chunked else (1,))
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_peaks_are_those_of_the_whole_run(name: str) -> None:
    for p, m, v in cases(name):
        plan = make_plan(name, p, m, v)
        assert peak_bytes(name, p, m, v, [1] * p * v, [1] * p * v) == simulate(plan).peak_live
        # stages of different sizes
        whole, kept = [100 + 7 * s for s in range(p * v)], [40 + 3 * s for s in range(p * v)]
        expected = [
            max(
                sum(n * whole[rank + i * p] for i, n in enumerate(running))
                + sum(n * kept[rank + i * p] for i, n in enumerate(waiting))
                for running, waiting in live_counts(actions)
            )
            for rank, actions in enumerate(plan)
        ]
        assert peak_bytes(name, p, m, v, whole, kept) == expected


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_is_that_of_the_whole_run(name: str) -> None:
    for p, m, v in cases(name):
        assert bubble(name, p, m, v) == pytest.approx(simulate(make_plan(name, p, m, v)).bubble, abs=1e-12)


def test_a_very_long_pipeline_is_forecast_at_once() -> None:
    began = time.process_time()
    for p, m in [(100, 60), (100, 1000), (512, 100_000), (1000, 65536)]:
        for name in ("1f1b", "gpipe", "zb-h1"):
            peaks = peak_bytes(name, p, m, 1, [1] * p, [1] * p)
            exact = [m if name == "gpipe" else min(p - r if name == "1f1b" else p, m) for r in range(p)]
            # never too low, and by no more than a part in 64 of the pipeline too high
            assert all(e <= found <= e + 2 + p / 64 + (m - e) / 64 for e, found in zip(exact, peaks)), (name, p, m)
        assert bubble("1f1b", p, m, 1) == pytest.approx((p - 1) / (m + p - 1), rel=0.02)
        assert bubble("interleaved", p, m * p, 2) == pytest.approx((p - 1) / (2 * m * p + p - 1), rel=1e-9)
    assert time.process_time() - began < 5
