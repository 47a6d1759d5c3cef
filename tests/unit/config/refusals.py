"""Configurations by key, and the message with which one is refused."""

import dataclasses
from typing import Any

import pytest

from megalite.config import Config, ConfigError, check, resolve


def make(**keys: Any) -> Config:
    """`model__num_heads=6` sets model.num_heads."""
    config = Config()
    for key, value in keys.items():
        section, name = key.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def refusal(ranks: int, **keys: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(resolve(make(**keys), ranks), ranks)
    assert "\n" not in str(error.value)
    return str(error.value)
