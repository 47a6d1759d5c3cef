"""The global batch as a pure function of consumed samples: constant, or ramped up (Brown et al. 2020, appendix B)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from megalite.config.errors import ConfigError
from megalite.config.schema import TrainConfig
from megalite.config.values import shown


def batch_size(t: TrainConfig, dp: int, samples: int) -> int:
    """Samples of the step that starts after `samples` samples, a multiple of micro_batch_size x dp.

    Grows linearly from train.ramp_start to train.global_batch_size over train.ramp_samples, rounded down.
    """
    if samples >= t.ramp_samples:
        return t.global_batch_size
    unit = t.micro_batch_size * dp
    grown = t.ramp_start + (t.global_batch_size - t.ramp_start) * samples // t.ramp_samples
    return max(unit, grown // unit * unit)


def _ramp(t: TrainConfig, dp: int, used: int) -> Iterator[tuple[int, int, int]]:
    """The rest of the ramp as plateaus: (samples before it, samples of each of its steps, number of its steps)."""
    samples = used
    while samples < t.ramp_samples:
        size = batch_size(t, dp, samples)
        # the first sample at which the batch is larger than `size`
        unit = t.micro_batch_size * dp
        growth = t.global_batch_size - t.ramp_start
        more = -(-(size + unit - t.ramp_start) * t.ramp_samples // growth) if growth > 0 else t.ramp_samples
        steps = max(1, -(-(min(more, t.ramp_samples) - samples) // size))
        yield samples, size, steps
        samples += size * steps


def steps_for(t: TrainConfig, dp: int, samples: float, steps: int = 0, used: int = 0) -> int:
    """The smallest number of steps that use at least `samples` samples, if `steps` steps have used `used` of them."""
    for before, size, count in _ramp(t, dp, used):
        if before + size * count >= samples:
            return max(1, steps + math.ceil(max(0, samples - before) / size))
        used, steps = before + size * count, steps + count
    return max(1, steps + math.ceil(max(0, samples - used) / t.global_batch_size))


def total_samples(t: TrainConfig, dp: int, steps: int = 0, used: int = 0) -> int:
    """Samples of all train.steps steps, if `steps` steps have used `used` samples, perhaps at another batch size."""
    left = max(0, t.steps - steps)
    for before, size, count in _ramp(t, dp, used):
        if count >= left:
            return before + left * size
        left, used = left - count, before + size * count
    return used + left * t.global_batch_size


def skipped_ranges(text: str) -> list[range]:
    """`train.skip_samples`, such as 320:352,960:992, as ranges. Raises ConfigError if it cannot be parsed."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        ends = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", part)
        if ends is None or int(ends[1]) >= int(ends[2]):
            raise ConfigError(
                f"train.skip_samples={shown(text)}: {shown(part)!r} is not FIRST:END with FIRST below END; write e.g. "
                f"train.skip_samples=320:352 for the samples 320 to 351"
            )
        found.append(range(int(ends[1]), int(ends[2])))
    return found


def is_skipped(t: TrainConfig, samples: range) -> bool:
    """Whether a batch of `samples` is skipped because it contains one of train.skip_samples."""
    ranges = skipped_ranges(t.skip_samples)
    return any(r.start < samples.stop and samples.start < r.stop for r in ranges)
