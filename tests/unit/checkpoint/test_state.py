"""A run's state goes into a manifest and comes out of it; impossible values are refused by name."""

import dataclasses
import math
from typing import Any

import pytest

from megalite.checkpoint.state import State, state_from

STATE = State(step=7, consumed_samples=56, skipped_steps=1, loss_scale=2.0**16, best_loss=1.5, data="corpus: 9 tokens")


def test_what_is_written_is_read() -> None:
    assert state_from(dataclasses.asdict(STATE)) == STATE
    assert state_from(dataclasses.asdict(State())) == State()


def test_the_first_checkpoints_of_the_format_have_no_base() -> None:
    values = dataclasses.asdict(STATE)
    del values["base"]
    assert state_from(values) == STATE


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(State) if field.name != "base"])
def test_a_missing_field_is_named(name: str) -> None:
    values = dataclasses.asdict(STATE)
    del values[name]
    with pytest.raises(ValueError, match=f"^{name} is missing$"):
        state_from(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, r"^step is -1; it can be 0 to"),
        ({"step": True}, r"^step is True$"),
        ({"step": "7"}, r"^step is '7'$"),
        ({"consumed_samples": 6}, r"^consumed_samples is 6 at step 7; every step consumes some"),
        ({"step": 0, "skipped_steps": 0}, r"^consumed_samples is 56 at step 0"),
        ({"skipped_steps": 9}, r"^skipped_steps is 9 at step 7; it can be 0 to 8"),
        ({"loss_scale": 0.0}, r"^loss_scale is 0.0, not a number above 0"),
        ({"loss_scale": math.inf}, r"^loss_scale is inf"),
        ({"best_loss": math.nan}, r"^best_loss is nan, not a finite number"),
        ({"best_loss": 10**400}, r"^best_loss is 1000"),
        ({"base": "/runs/a"}, r"^base is '/runs/a', not a fingerprint and a path"),
    ],
)
def test_an_impossible_value_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state_from(dataclasses.asdict(STATE) | changes)
