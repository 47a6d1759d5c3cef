"""Rotary positions of config.json: both spellings are read, and what is written is read back."""

import dataclasses
from typing import Any

import pytest

from megalite.config import ModelConfig, resolve_model
from megalite.exchange.hf_fields import Fields
from megalite.exchange.hf_rope import read_rope, rope_context, write_rope

MODEL = resolve_model(ModelConfig(), 64)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(**config: Any) -> dict[str, Any]:
    return read_rope(Fields(config, "config.json"))


@pytest.mark.parametrize(
    "scaling",
    [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3, YARN, YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}],
)
def test_what_is_written_is_read_back(scaling: dict[str, Any] | None) -> None:
    model = dataclasses.replace(MODEL, **read(rope_theta=5e5, rope_scaling=scaling))
    assert model.rope_theta == 5e5
    written = write_rope(model)
    assert read(**written) == read(rope_theta=5e5, rope_scaling=scaling)
    # as transformers 5 spells it
    assert read(rope_parameters=(scaling or {}) | {"rope_theta": 5e5}) == read(**written)


def test_scaling_is_preferred_to_parameters_and_an_inner_theta_to_an_outer_one() -> None:
    linear = {"type": "linear", "factor": 3.0, "rope_theta": 7.0}
    found = read(rope_theta=5.0, rope_scaling=linear, rope_parameters={"rope_theta": 9.0})
    assert found == {"rope_theta": 7.0, "rope_scaling": "linear", "rope_factor": 3.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": "yarn"}, "is not an object of keys"),
        ({"rope_parameters": {"full_attention": {}}}, "differs between layers"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "is not supported; use one of default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate=false is not supported"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "factor and mscale mean 1.138629"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "above 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "use 1.0"),
    ],
)
def test_what_is_not_computed_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read(**config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("scaling", "stated", "context"),
    [
        (None, 2048, 2048),
        ({"rope_type": "linear", "factor": 2.0}, 2048, 4096),
        (LLAMA3, 131072, 131072),
        (LLAMA3, 8192, 65536),
        (YARN, 32768, 131072),
        (None, None, None),
        (None, True, None),
        (None, 0, None),
    ],
)
def test_the_context_of_a_model(scaling: dict[str, Any] | None, stated: Any, context: int | None) -> None:
    model = dataclasses.replace(MODEL, **read(rope_scaling=scaling))
    assert rope_context(model, stated) == context
