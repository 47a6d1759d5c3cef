"""The configuration that a run uses: every key that may be null until it has been chosen has a value.

`Config` is what a user wrote. `resolve` makes a `Resolved` of it: the same keys, in the same order, with the same YAML.
What reads files or shows YAML takes a `Config`; what computes takes a `Resolved`, and needs no check for None.
Two configurations are equal only if they are of the same class: compare their YAML, or `dataclasses.asdict`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megalite.config.batch import total_samples
from megalite.config.errors import ConfigError
from megalite.config.parameters import Shape
from megalite.config.schema import SECTIONS, Config, ModelConfig, OptimConfig, ParallelConfig
from megalite.config.shapes import family_of, shapes
from megalite.config.trained import adapter_shapes, hidden_matrices, trained
from megalite.config.values import check_values


def _chosen(section: type, name: str) -> Any:
    """The metadata of a key whose type is narrowed, so that it keeps its range and its help."""
    return section.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]


class _Complete:
    """Raises TypeError if a narrowed key is None: `dataclasses.replace(..., **values)` can hide that from mypy."""

    def __post_init__(self) -> None:
        for name in type(self).__annotations__:
            if getattr(self, name) is None:
                raise TypeError(f"{type(self).__name__}.{name} is None; call resolve")


@dataclass(frozen=True)
class ResolvedModel(_Complete, ModelConfig):
    num_kv_heads: int = field(kw_only=True, metadata=_chosen(ModelConfig, "num_kv_heads"))
    head_dim: int = field(kw_only=True, metadata=_chosen(ModelConfig, "head_dim"))
    family: str = field(kw_only=True, metadata=_chosen(ModelConfig, "family"))

    @property
    def learned_positions(self) -> int:
        """Rows of the learned position embedding; 0 for a model with RoPE."""
        return (self.max_positions or 0) if self.position == "learned" else 0


@dataclass(frozen=True)
class ResolvedParallel(_Complete, ParallelConfig):
    tp: int = field(kw_only=True, metadata=_chosen(ParallelConfig, "tp"))
    pp: int = field(kw_only=True, metadata=_chosen(ParallelConfig, "pp"))
    dp: int = field(kw_only=True, metadata=_chosen(ParallelConfig, "dp"))


@dataclass(frozen=True)
class ResolvedOptim(_Complete, OptimConfig):
    decay_samples: int = field(kw_only=True, metadata=_chosen(OptimConfig, "decay_samples"))


@dataclass(frozen=True)
class Resolved(Config):
    """What `resolve` returns, with what follows from it and is needed often; that is computed once."""

    model: ResolvedModel = field(kw_only=True)
    parallel: ResolvedParallel = field(kw_only=True)
    optim: ResolvedOptim = field(kw_only=True)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every parameter of the whole model, by name."""
        return shapes(self.model)

    @cached_property
    def factor_shapes(self) -> dict[str, Shape]:
        """The shape of every LoRA factor, by name."""
        return adapter_shapes(self)

    @cached_property
    def trained(self) -> dict[str, Shape]:
        """The shape of every parameter that is trained, by name. Raises ConfigError as `trained` does."""
        return trained(self)

    @cached_property
    def hidden_matrices(self) -> list[str]:
        """The trained matrices of the blocks, which Muon updates. Raises ConfigError as `trained` does."""
        return hidden_matrices(self)


def resolve_model(model: ModelConfig, seq_len: int) -> ResolvedModel:
    """Fill in the keys of a model that follow from others. Raises ConfigError if the heads do not divide the width.

    `seq_len`: rows of a learned position embedding where model.max_positions is null.
    """
    if model.head_dim is None and model.hidden_size % model.num_heads:
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}; change one "
            f"of them, or set model.head_dim"
        )
    values = _values(model)
    values |= {
        "num_kv_heads": model.num_kv_heads if model.num_kv_heads is not None else model.num_heads,
        "head_dim": model.head_dim if model.head_dim is not None else model.hidden_size // model.num_heads,
        "family": family_of(model),
    }
    if model.position == "learned" and model.max_positions is None:
        values["max_positions"] = seq_len
    return ResolvedModel(**values)


def resolve(config: Config, world_size: int) -> Resolved:
    """Replace every null that follows from other keys and the number of ranks. Call `check` on the result.

    parallel.tp and parallel.pp become 1 unless they have been chosen before (megalite.plan.topology).
    Raises ConfigError if a value is out of its range.
    """
    check_values(config)
    p, optim = config.parallel, config.optim
    model = resolve_model(config.model, config.train.seq_len)
    tp, pp = p.tp or 1, p.pp or 1
    dp = p.dp if p.dp is not None else max(1, world_size // max(1, tp * pp * p.cp))
    decay = optim.decay_samples
    if decay is None:
        decay = max(total_samples(config.train, dp), optim.warmup_samples)
    sections = _values(config) | {
        "model": model,
        "parallel": ResolvedParallel(**_values(p) | {"tp": tp, "pp": pp, "dp": dp, "sp": p.sp and tp > 1}),
        "optim": ResolvedOptim(**_values(optim) | {"decay_samples": decay}),
    }
    return Resolved(**sections)


def reopen(config: Config, *keys: str) -> Config:
    """`config` with `keys`, such as "parallel.dp", null again: `resolve` chooses them anew."""
    sections = {}
    for name, section in SECTIONS.items():
        values = _values(getattr(config, name))
        sections[name] = section(**values | {key: None for key in values if f"{name}.{key}" in keys})
    return Config(**sections)


def _values(section: Any) -> dict[str, Any]:
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
