"""The model with every key chosen."""

import dataclasses

import pytest

from megalite.config import ConfigError, ModelConfig, ResolvedModel, resolve_model


def test_what_follows_from_other_keys() -> None:
    model = resolve_model(ModelConfig(hidden_size=24, num_heads=4), 8)
    assert (model.num_kv_heads, model.head_dim, model.family) == (4, 6, "llama")
    assert resolve_model(model, 8) == model
    asked = ModelConfig(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=10, family="gpt2")
    model = resolve_model(asked, 8)
    assert dataclasses.asdict(model) == dataclasses.asdict(asked)


def test_the_family_follows_from_the_positions_unless_it_is_set() -> None:
    learned = ModelConfig(position="learned", max_positions=13)
    assert resolve_model(learned, 8).family == "gpt2"
    assert resolve_model(dataclasses.replace(learned, family="llama"), 8).family == "llama"


def test_a_resolved_model_needs_every_key() -> None:
    with pytest.raises(TypeError, match="required keyword-only arguments: 'num_kv_heads', 'head_dim', and 'family'"):
        ResolvedModel()  # type: ignore[call-arg]


def test_learned_positions_are_as_many_as_a_sample_has_tokens() -> None:
    model = ModelConfig(position="learned")
    assert resolve_model(model, 48).learned_positions == 48
    assert resolve_model(dataclasses.replace(model, max_positions=7), 48).learned_positions == 7
    assert resolve_model(ModelConfig(max_positions=7), 48).learned_positions == 0


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden_size=12 is not a multiple of model.num_heads=5; change one of them"):
        resolve_model(ModelConfig(hidden_size=12, num_heads=5), 8)
