"""The model with every key chosen: what all that computes with a model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megalite.config.errors import ConfigError
from megalite.config.schema import ModelConfig


def rule_of(section: type, key: str) -> Mapping[str, Any]:
    """The metadata of a key, for the field that narrows its type: range, choices and help stay the same."""
    found: Mapping[str, Any] = section.__dataclass_fields__[key].metadata  # type: ignore[attr-defined]
    return found


def values_of(section: Any) -> dict[str, Any]:
    """The values of a section, or the sections of a configuration, by name."""
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}


class Complete:
    """Raises TypeError if a narrowed key is None: `dataclasses.replace(..., **values)` can hide that from mypy."""

    def __post_init__(self) -> None:
        for name in type(self).__annotations__:
            if getattr(self, name) is None:
                raise TypeError(f"{type(self).__name__}.{name} is None; call resolve")


@dataclass(frozen=True)
class ResolvedModel(Complete, ModelConfig):
    num_kv_heads: int = field(kw_only=True, metadata=rule_of(ModelConfig, "num_kv_heads"))
    head_dim: int = field(kw_only=True, metadata=rule_of(ModelConfig, "head_dim"))
    family: str = field(kw_only=True, metadata=rule_of(ModelConfig, "family"))

    @property
    def learned_positions(self) -> int:
        """Rows of the learned position embedding; 0 for a model with RoPE."""
        return (self.max_positions or 0) if self.position == "learned" else 0


def resolve_model(model: ModelConfig, seq_len: int) -> ResolvedModel:
    """Fill in the keys of a model that follow from others. Raises ConfigError if the heads do not divide the width.

    `seq_len`: rows of a learned position embedding if model.max_positions is null.
    """
    if model.head_dim is None and (model.num_heads < 1 or model.hidden_size % model.num_heads):
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}; change one "
            f"of them, or set model.head_dim"
        )
    learned = model.position == "learned"
    chosen = {
        "num_kv_heads": model.num_kv_heads if model.num_kv_heads is not None else model.num_heads,
        "head_dim": model.head_dim if model.head_dim is not None else model.hidden_size // model.num_heads,
        "family": model.family or ("gpt2" if learned else "llama"),
        "max_positions": seq_len if learned and model.max_positions is None else model.max_positions,
    }
    return ResolvedModel(**values_of(model) | chosen)
