"""The loss scale halves at an overflow, doubles after a window of steps without, and is 1 where nothing is scaled."""

import re

import pytest

from megalite.config import Config, OptimConfig, TrainConfig
from megalite.optim.loss_scale import exhausted, first_scale, next_scale

OPTIM = OptimConfig(loss_scale_initial=8.0, loss_scale_window=3, loss_scale_min=1.0)


def play(dtype: str, finite: list[bool]) -> list[float]:
    config = Config(optim=OPTIM, train=TrainConfig(dtype=dtype))
    scale, steps = first_scale(config), 0
    scales = [scale]
    for each in finite:
        scale, steps = next_scale(config, scale, steps, each)
        scales.append(scale)
    return scales


def test_golden() -> None:
    assert play("fp16", [True] * 7) == [8, 8, 8, 16, 16, 16, 32, 32]
    # an overflow begins the window afresh
    assert play("fp16", [True, True, False, True, True, True]) == [8, 8, 8, 4, 4, 4, 8]
    assert play("fp16", [False] * 3) == [8, 4, 2, 1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_other_types_are_not_scaled(dtype: str) -> None:
    assert play(dtype, [True] * 9) == [1] * 10


def test_a_scale_that_cannot_be_halved() -> None:
    config = Config(optim=OPTIM, train=TrainConfig(dtype="fp16"))
    assert [exhausted(config, scale) for scale in (8, 4, 2)] == ["", "", ""]
    assert re.search(r"loss scale of 1, optim.loss_scale_min=1: .* use train.dtype=bf16", exhausted(config, 1))
