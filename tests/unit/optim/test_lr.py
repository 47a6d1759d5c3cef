"""The learning-rate curve: golden values and what holds for every one."""

import itertools

import pytest

from megalite.config import OptimConfig
from megalite.optim.lr import learning_rate


def curve(schedule: str, warmup: int = 0, decay: int = 100) -> OptimConfig:
    return OptimConfig(lr=1.0, min_lr=0.1, lr_schedule=schedule, warmup_samples=warmup, decay_samples=decay)


@pytest.mark.parametrize(
    ("schedule", "samples", "expected"),
    [
        ("constant", 20, 1.0),
        ("constant", 1000, 1.0),
        ("linear", 20, 1.0),
        ("linear", 60, 0.55),
        ("linear", 80, 0.325),
        ("linear", 100, 0.1),
        ("linear", 1000, 0.1),
        ("cosine", 20, 1.0),
        ("cosine", 40, 0.1 + 0.9 * (1 + 0.5**0.5) / 2),  # a quarter of the way: cos 45°
        ("cosine", 60, 0.55),
        ("cosine", 80, 0.1 + 0.9 * (1 - 0.5**0.5) / 2),
        ("cosine", 100, 0.1),
        ("cosine", 1000, 0.1),
        ("wsd", 20, 1.0),
        ("wsd", 90, 1.0),
        ("wsd", 95, 0.55),
        ("wsd", 100, 0.1),
        ("wsd", 1000, 0.1),
        ("inverse_sqrt", 20, 1.0),
        ("inverse_sqrt", 80, 0.5),
        ("inverse_sqrt", 1000, 0.02**0.5),
        ("inverse_sqrt", 10**6, 0.1),
    ],
)
def test_golden(schedule: str, samples: int, expected: float) -> None:
    assert learning_rate(curve(schedule, warmup=20), samples) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 100])
def test_properties(schedule: str, warmup: int) -> None:
    rates = [learning_rate(curve(schedule, warmup), samples) for samples in range(130)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[warmup] == max(rates) == 1 or warmup == 100
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(b > a for a, b in itertools.pairwise(up))
    steps = [b - a for a, b in itertools.pairwise(up)]
    assert steps == pytest.approx([1 / (warmup + 1)] * len(steps))
    assert all(b <= a for a, b in itertools.pairwise(down))
    assert warmup == 100 or max(abs(b - a) for a, b in itertools.pairwise(down)) < 2 / (100 - warmup)  # no jump
    assert rates[-1] == (1.0 if schedule == "constant" else pytest.approx(0.1))


def test_the_step_that_takes_the_last_warmup_sample_is_not_zero_nor_above_the_peak() -> None:
    assert learning_rate(curve("cosine", warmup=3), 0) == 0.25
    assert learning_rate(curve("cosine", warmup=3), 2) == 0.75
    assert learning_rate(curve("cosine", warmup=3), 3) == 1


def test_wsd_never_decays_before_the_warmup_ends() -> None:
    c = OptimConfig(lr=1.0, min_lr=0.0, lr_schedule="wsd", wsd_decay_fraction=0.9, warmup_samples=50, decay_samples=100)
    assert [learning_rate(c, samples) for samples in (49, 50, 75, 100)] == [50 / 51, 1.0, 0.5, 0.0]
