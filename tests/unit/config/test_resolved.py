"""A resolved configuration has every key of the schema, and nothing left open."""

import dataclasses
import pickle
import typing

import pytest

from megalite.config import (
    Config,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
    from_mapping,
    reopen,
    resolve,
    to_yaml,
)
from megalite.config.read import read_yaml
from megalite.config.resolved import Resolved
from megalite.config.schema import SECTIONS, hints_of
from megalite.config.shapes import shapes

RESOLVED = hints_of(Resolved)


def test_keys_that_follow_from_others_are_filled_in() -> None:
    train = TrainConfig(steps=10, global_batch_size=16)
    config = resolve(Config(parallel=ParallelConfig(tp=2, pp=2), train=train), 8)
    assert (config.parallel.tp, config.parallel.pp, config.parallel.dp) == (2, 2, 2)
    assert (config.model.num_kv_heads, config.model.head_dim) == (4, 32)
    assert config.optim.decay_samples == 160
    assert config.parallel.sp
    assert not resolve(Config(), 1).parallel.sp  # one rank has nothing to shard over


def test_keys_that_the_user_has_set_are_kept() -> None:
    model, optim = ModelConfig(num_kv_heads=2, head_dim=10), OptimConfig(decay_samples=7, warmup_samples=3)
    config = resolve(Config(model, ParallelConfig(dp=1), optim=optim), 1)
    assert (config.model.num_kv_heads, config.model.head_dim) == (2, 10)
    assert (config.optim.decay_samples, config.parallel.dp) == (7, 1)


def test_the_decay_never_ends_before_the_warm_up() -> None:
    assert resolve(Config(optim=OptimConfig(warmup_samples=10**6)), 1).optim.decay_samples == 10**6


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_the_schema_is_there_with_its_rule(name: str) -> None:
    """In the same order, with the same range, choices and help: a key added to the schema needs nothing here."""
    plain, resolved = SECTIONS[name], RESOLVED[name]
    assert issubclass(resolved, plain)
    for mine, there in zip(dataclasses.fields(resolved), dataclasses.fields(plain), strict=True):
        assert (mine.name, mine.metadata) == (there.name, there.metadata)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_narrowed_key_has_the_type_without_none(name: str) -> None:
    plain, resolved = hints_of(SECTIONS[name]), hints_of(RESOLVED[name])
    narrowed = {key for key in plain if plain[key] != resolved[key]}
    assert narrowed == set(RESOLVED[name].__annotations__ if RESOLVED[name] is not SECTIONS[name] else ())
    for key in narrowed:
        assert set(typing.get_args(plain[key])) == {resolved[key], type(None)}


def test_a_narrowed_key_cannot_become_none() -> None:
    config = resolve(Config(), 1)
    with pytest.raises(TypeError, match=r"ResolvedOptim.decay_samples is None; call resolve"):
        dataclasses.replace(config.optim, **{"decay_samples": None})


def test_the_resolved_configuration_is_the_same_yaml_and_the_same_values() -> None:
    config = resolve(Config(), 1)
    assert resolve(config, 1) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config.model) == hash(resolve(Config(), 1).model)
    again = from_mapping(read_yaml(to_yaml(config), "config.yaml"))
    assert type(again) is Config
    assert to_yaml(again) == to_yaml(config)
    assert dataclasses.asdict(again) == dataclasses.asdict(config)
    # dataclasses compare classes: this is why nothing compares a Config with a Resolved
    assert again != config
    assert dataclasses.replace(config, train=TrainConfig(steps=7)).model is config.model


def test_what_follows_is_computed_once() -> None:
    tune = TuneConfig(mode="lora", lora_targets="attn.qkv", freeze="layers.0.*")
    config = resolve(Config(tune=tune), 1)
    assert config.shapes.model == shapes(config.model)
    assert {name.split(".")[1] for name in config.shapes.factors} == {"0", "1", "2", "3"}
    assert {name.split(".")[1] for name in config.shapes.trained} == {"1", "2", "3"}
    assert config.shapes.hidden == []
    other = dataclasses.replace(config, train=TrainConfig(steps=7))
    assert other.shapes is config.shapes
    full = dataclasses.replace(config, tune=TuneConfig())
    assert full.shapes.trained == full.shapes.model
    assert len(full.shapes.hidden) == 4 * config.model.num_layers


def test_reopened_keys_are_chosen_anew() -> None:
    config = resolve(Config(train=TrainConfig(steps=10, global_batch_size=16)), 2)
    opened = reopen(config, "parallel.dp", "optim.decay_samples")
    assert type(opened) is Config
    assert (opened.parallel.dp, opened.optim.decay_samples, opened.parallel.tp) == (None, None, 1)
    longer = resolve(dataclasses.replace(opened, train=TrainConfig(steps=20, global_batch_size=16)), 4)
    assert (longer.parallel.dp, longer.optim.decay_samples) == (4, 320)
    assert resolve(reopen(config), 2) == config
