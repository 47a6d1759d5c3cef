"""The learning rate as a pure function of consumed samples."""

from __future__ import annotations

import math

from megalite.config.resolved import ResolvedOptim


def learning_rate(c: ResolvedOptim, samples: int) -> float:
    """The learning rate of the step that starts after `samples` samples: linear warm-up, then optim.lr_schedule.

    cosine: half a period, without restarts (Loshchilov & Hutter 2017, SGDR). wsd (warm-up, stable, decay; Hu et al.
    2024, MiniCPM): constant, then linear over the last `wsd_decay_fraction` of `decay_samples`. inverse_sqrt:
    proportional to sqrt(warmup_samples / samples) (Vaswani et al. 2017), at least min_lr. The first step after the last
    warm-up sample has the peak rate.
    """
    if samples < c.warmup_samples:
        return c.lr * (samples + 1) / (c.warmup_samples + 1)
    if c.lr_schedule == "constant":
        return c.lr
    if c.lr_schedule == "inverse_sqrt":
        return max(c.min_lr, c.lr * math.sqrt(c.warmup_samples / max(1, samples)))
    start = c.warmup_samples
    if c.lr_schedule == "wsd":
        start = max(start, c.decay_samples - round(c.wsd_decay_fraction * c.decay_samples))
    span = max(1, c.decay_samples - start)
    done = min(1.0, max(0.0, (samples - start) / span))
    left = (1 + math.cos(math.pi * done)) / 2 if c.lr_schedule == "cosine" else 1 - done
    return c.min_lr + (c.lr - c.min_lr) * left
