"""The global batch as a pure function of consumed samples: constant, or ramped up (Brown et al. 2020, appendix B)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalite.config.schema import Config


def batch_size(config: Config, samples: int) -> int:
    """Samples of the step that begins after `samples` samples, a multiple of micro_batch_size x dp.

    Grows linearly from train.ramp_start to train.global_batch_size over train.ramp_samples, rounded down.
    """
    t, dp = config.train, config.parallel.dp
    assert dp is not None
    if samples >= t.ramp_samples:
        return t.global_batch_size
    unit = t.micro_batch_size * dp
    grown = t.ramp_start + (t.global_batch_size - t.ramp_start) * samples // t.ramp_samples
    return max(unit, grown // unit * unit)


def _ramp(config: Config) -> Iterator[tuple[int, int, int]]:
    """The ramp as plateaus: (samples before it, samples of each of its steps, number of its steps)."""
    t, samples = config.train, 0
    while samples < t.ramp_samples:
        size = batch_size(config, samples)
        # the first sample at which the rule gives more than `size`
        unit = t.micro_batch_size * (config.parallel.dp or 1)
        growth = t.global_batch_size - t.ramp_start
        more = -(-(size + unit - t.ramp_start) * t.ramp_samples // growth) if growth > 0 else t.ramp_samples
        steps = max(1, -(-(min(more, t.ramp_samples) - samples) // size))
        yield samples, size, steps
        samples += size * steps


def steps_for(config: Config, samples: float) -> int:
    """The least number of steps that use at least `samples` samples."""
    used = steps = 0
    for before, size, count in _ramp(config):
        if before + size * count >= samples:
            return max(1, steps + math.ceil((samples - before) / size))
        used, steps = before + size * count, steps + count
    return max(1, steps + math.ceil(max(0, samples - used) / config.train.global_batch_size))


def total_samples(config: Config) -> int:
    """Samples of all train.steps steps."""
    left, used = config.train.steps, 0
    for before, size, count in _ramp(config):
        if count >= left:
            return before + left * size
        left, used = left - count, before + size * count
    return used + left * config.train.global_batch_size
