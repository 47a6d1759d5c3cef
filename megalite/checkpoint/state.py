"""The state of a run that a checkpoint keeps besides tensors, and the values it can have. No torch here."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.schema import LARGEST_LOSS_SCALE

# more samples than any run consumes; positions in the data up to here are exact in 64 bits
MOST = 10**15


@dataclass
class State:
    """What a checkpoint keeps besides tensors.

    `consumed_samples`: samples used so far, not those prefetched; the position in the data. `skipped_steps`: steps
    that used their samples without an update. `scale_steps`: steps since the loss scale last changed. `data`:
    fingerprint of the training data. `base`: fingerprint and path of the weights that LoRA factors belong to.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    loss_scale: float = 1.0
    scale_steps: int = 0
    best_loss: float | None = None
    evals_without_gain: int = 0
    data: str = ""
    base: str = ""


_TYPES: dict[str, Any] = {"int": int, "float": (int, float), "float | None": (int, float, type(None)), "str": str}


def state_from(manifest: Mapping[str, Any]) -> State:
    """The state in a manifest. Raises ValueError if a field is missing, of another type, or impossible."""
    values: dict[str, Any] = {"base": ""}  # missing in the first checkpoints of format 3
    for field in dataclasses.fields(State):
        value = values[field.name] = manifest.get(field.name, values.get(field.name, field))
        if not isinstance(value, _TYPES[str(field.type)]) or isinstance(value, bool):
            raise ValueError(f"{field.name} is {'missing' if value is field else repr(value)}")
    state = State(**values)
    for name in ("step", "consumed_samples"):
        _require_count(name, values[name], MOST, "")
    for name in ("skipped_steps", "scale_steps", "evals_without_gain"):
        _require_count(name, values[name], state.step + 1, f" at step {state.step}")
    if state.consumed_samples < state.step or (state.step == 0 < state.consumed_samples):
        raise ValueError(f"consumed_samples is {state.consumed_samples} at step {state.step}; every step consumes some")
    if not 0 < state.loss_scale <= LARGEST_LOSS_SCALE:
        raise ValueError(f"loss_scale is {state.loss_scale!r}, not a number above 0 and up to {LARGEST_LOSS_SCALE:.3g}")
    largest = sys.float_info.max  # an int may be too large for a float
    if state.best_loss is not None and not -largest <= state.best_loss <= largest:
        raise ValueError(f"best_loss is {state.best_loss!r}, not a finite number")
    if state.base and not re.fullmatch(r"[0-9a-f]{16} .+", state.base, re.DOTALL):
        raise ValueError(f"base is {state.base!r}, not a fingerprint and a path")
    return state


def _require_count(name: str, value: int, most: int, when: str) -> None:
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}{when}; it can be 0 to {most}")
