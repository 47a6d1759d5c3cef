"""The global batch as a pure function of consumed samples: constant, or ramped up (Brown et al. 2020, appendix B)."""

from __future__ import annotations

import math

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


def steps_for(config: Config, samples: float) -> int:
    """The least number of steps that use at least `samples` samples."""
    used = steps = 0
    while used < min(samples, config.train.ramp_samples):
        used, steps = used + batch_size(config, used), steps + 1
    return max(1, steps + math.ceil(max(0, samples - used) / config.train.global_batch_size))


def total_samples(config: Config) -> int:
    """Samples of all train.steps steps."""
    samples = steps = 0
    while samples < config.train.ramp_samples and steps < config.train.steps:
        samples, steps = samples + batch_size(config, samples), steps + 1
    return samples + (config.train.steps - steps) * config.train.global_batch_size
