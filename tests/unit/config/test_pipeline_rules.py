"""What a schedule asks of stages and microbatches: every message has the numbers and what would work."""

from typing import Any

import pytest
from refusals import make, refusal

from megalite.config import check, resolve
from megalite.config.pipeline_rules import pipeline_fault

MESSAGES: list[tuple[int, dict[str, Any], str]] = [
    (
        5,
        {"parallel__pp": 5},
        "parallel.pp=5 stages need at least 5 layers, model.num_layers=4; use parallel.pp=4 or less",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__chunks": 2},
        "parallel.chunks=2 needs parallel.schedule=interleaved, not 1f1b; use that, or parallel.chunks=1",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__schedule": "zb-h1", "parallel__chunks": 3},
        "parallel.chunks=3 needs parallel.schedule=interleaved, not zb-h1; use that, or parallel.chunks=1",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__schedule": "interleaved"},
        "parallel.schedule=interleaved needs several stages on each rank, parallel.chunks is 1; use "
        "parallel.chunks=2 or more, or parallel.schedule=1f1b",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__schedule": "interleaved", "parallel__chunks": 3},
        "parallel.pp=2 x parallel.chunks=3 = 6 stages need at least 6 layers, model.num_layers=4; "
        "use parallel.chunks=2",
    ),
    (
        3,
        {"parallel__pp": 3, "parallel__schedule": "interleaved", "parallel__chunks": 2},
        "parallel.pp=3 x parallel.chunks=2 = 6 stages need at least 6 layers, model.num_layers=4; "
        "use parallel.schedule=1f1b parallel.chunks=1",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__schedule": "interleaved", "parallel__chunks": 2, "train__global_batch_size": 12},
        "parallel.schedule=interleaved needs a multiple of parallel.pp=2 microbatches in each step, and "
        "train.global_batch_size=12 / (train.micro_batch_size=4 x dp 1) is 3; use train.global_batch_size=8 or 16",
    ),
    (
        4,
        {
            "parallel__pp": 4,
            "model__num_layers": 8,
            "parallel__schedule": "interleaved",
            "parallel__chunks": 2,
            "train__global_batch_size": 8,
        },
        "parallel.schedule=interleaved needs a multiple of parallel.pp=4 microbatches in each step, and "
        "train.global_batch_size=8 / (train.micro_batch_size=4 x dp 1) is 2; use train.global_batch_size=16",
    ),
    (
        2,
        {
            "parallel__pp": 2,
            "parallel__schedule": "interleaved",
            "parallel__chunks": 2,
            "train__ramp_start": 8,
            "train__ramp_samples": 64,
        },
        "parallel.schedule=interleaved needs a multiple of parallel.pp=2 microbatches in each step, and "
        "train.ramp_samples=64 grows the batch by one at a time; use train.ramp_start=0 train.ramp_samples=0, or "
        "parallel.schedule=1f1b parallel.chunks=1",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__schedule": "interleaved", "parallel__chunks": 2, "parallel__stages": (2, 2)},
        "parallel.stages=[2, 2] names 2 stages, parallel.pp=2 x parallel.chunks=2; make them equal",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__schedule": "zb-h2"},
        "parallel.schedule=zb-h2: must be one of 1f1b, gpipe, interleaved, zb-h1; did you mean zb-h1?",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__stages": (1, 1, 2)},
        "parallel.stages=[1, 1, 2] names 3 stages, parallel.pp=2; make them equal",
    ),
]


@pytest.mark.parametrize(("ranks", "keys", "message"), MESSAGES, ids=[m[:60] for _, _, m in MESSAGES])
def test_messages(ranks: int, keys: dict[str, Any], message: str) -> None:
    assert refusal(ranks, **keys) == message
    assert pipeline_fault(resolve(make(**keys), ranks)) == message


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (2, {"parallel__pp": 2, "parallel__schedule": "zb-h1", "train__global_batch_size": 12}),
        (2, {"parallel__pp": 2, "parallel__schedule": "interleaved", "parallel__chunks": 2}),
        (1, {"parallel__schedule": "interleaved", "parallel__chunks": 4, "train__global_batch_size": 12}),
        (
            2,
            {
                "parallel__pp": 2,
                "parallel__schedule": "interleaved",
                "parallel__chunks": 2,
                "parallel__stages": (1, 1, 1, 1),
            },
        ),
    ],
)
def test_what_is_allowed(ranks: int, keys: dict[str, Any]) -> None:
    config = resolve(make(**keys), ranks)
    assert pipeline_fault(config) == ""
    check(config, ranks)
