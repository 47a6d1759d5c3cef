"""The learning rate as a pure function of consumed samples."""

from __future__ import annotations

import math

from megalite.config import OptimConfig


def learning_rate(c: OptimConfig, samples: int) -> float:
    """Rate of the step that starts after `samples` samples: linear warm-up, then constant, linear or cosine decay.

    The cosine is the half period of Loshchilov & Hutter 2017 (SGDR) without restarts. The step that consumes the last
    warm-up sample has the peak rate.
    """
    assert c.decay_samples is not None
    if samples < c.warmup_samples:
        return c.lr * (samples + 1) / (c.warmup_samples + 1)
    if c.lr_schedule == "constant":
        return c.lr
    span = max(1, c.decay_samples - c.warmup_samples)
    done = min(1.0, (samples - c.warmup_samples) / span)
    left = 1 - done if c.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return c.min_lr + (c.lr - c.min_lr) * left
