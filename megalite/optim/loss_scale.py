"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, section 3.2).

fp16 has no number between 0 and 6e-8 nor above 65504. Gradients are computed of the loss times a scale, which a step
whose gradients overflow halves, and which doubles after `optim.loss_scale_window` steps without overflow. Powers of two
change no digit of what neither overflows nor vanishes.
"""

from __future__ import annotations

from megalite.config import Resolved
from megalite.config.schema import LARGEST_LOSS_SCALE


def first_scale(config: Resolved) -> float:
    """The loss scale of the first step: 1 where nothing is scaled."""
    return config.optim.loss_scale_initial if config.train.dtype == "fp16" else 1.0


def exhausted(config: Resolved, scale: float) -> str:
    """Why training cannot go on after an overflow at `scale`; "" if the scale can still be halved."""
    c = config.optim
    if scale / 2 >= c.loss_scale_min:
        return ""
    return (
        f"gradients overflow fp16 even at a loss scale of {scale:g}, optim.loss_scale_min={c.loss_scale_min:g}: "
        f"training has diverged, or fp16 is too narrow for this model; use train.dtype=bf16, or lower optim.lr"
    )


def next_scale(config: Resolved, scale: float, steps: int, finite: bool) -> tuple[float, int]:
    """(loss scale, steps since it changed) after a step at `scale`, which was already used for `steps` steps.

    `finite`: whether the gradients of the step are. If they are not, the caller has asked `exhausted` first.
    """
    c = config.optim
    if config.train.dtype != "fp16":
        return scale, 0
    if not finite:
        return scale / 2, 0
    return (min(2 * scale, LARGEST_LOSS_SCALE), 0) if steps + 1 >= c.loss_scale_window else (scale, steps + 1)
