"""Rotary positions in config.json, as transformers 4 and 5 spell them, and back. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megalite.config import ResolvedModel
from megalite.exchange.hf_fields import Fields


def read_rope(config: Fields) -> dict[str, Any]:
    """The rope keys of a `ModelConfig`. Raises ValueError for a kind of scaling that megalite cannot compute.

    As in transformers, a non-empty rope_scaling is preferred to rope_parameters, and a rope_theta inside either to the
    one outside.
    """
    name = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    found = config.values.get(name) or {}
    if not isinstance(found, Mapping):
        raise config.refuse(name, "is not an object of keys")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise config.refuse(name, "differs between layers, which is not supported")
    rope = Fields(found, f"{config.where}: {name}")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0, above=1), above=1)
    kind = rope.word("rope_type" if "rope_type" in found else "type", "default")
    if rope.number("partial_rotary_factor", 1.0, null=1.0) != 1.0:
        raise rope.refuse("partial_rotary_factor", "is not supported for this family; use 1.0")
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind == "default":
        return fields
    if kind not in ("linear", "llama3", "yarn"):
        raise rope.refuse("rope_type", "is not supported; use one of default, linear, llama3, yarn", kind)
    fields |= {"rope_scaling": kind, "rope_factor": rope.number("factor", low=1)}
    if kind == "linear":
        return fields
    # as in transformers: the number outside the object, then the one in it, then the model's context
    inside = "original_max_position_embeddings"
    length = config if inside in config.values else rope if inside in found else None
    fields["rope_original_max_positions"] = (length or config).whole(inside if length else "max_position_embeddings")
    return fields | (_read_llama3(rope) if kind == "llama3" else _read_yarn(rope, fields["rope_factor"]))


def _read_llama3(rope: Fields) -> dict[str, float]:
    low = rope.number("low_freq_factor", above=0)
    return {"rope_low_freq_factor": low, "rope_high_freq_factor": rope.number("high_freq_factor", above=low)}


def _read_yarn(rope: Fields, factor: float) -> dict[str, float]:
    if not rope.flag("truncate", True):
        raise rope.refuse("truncate", "is not supported; megalite rounds yarn's ramp to whole features")
    # 0 and null mean the default there
    fast = rope.number("beta_fast", 0.0, null=0.0, low=0) or 32.0
    slow = rope.number("beta_slow", 0.0, null=0.0, low=0) or 1.0
    weights = [rope.number(key, 0.0, null=0.0, low=0) for key in ("mscale", "mscale_all_dim")]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    usual = mscale(weights[0]) / mscale(weights[1]) if all(weights) else mscale(1.0)
    given = rope.number("attention_factor", usual, null=usual)
    if not math.isclose(given, usual, rel_tol=1e-6):
        raise rope.refuse("attention_factor", f"is not supported; factor and mscale mean {usual:.6f}")
    names = ("rope_beta_fast", "rope_beta_slow", "rope_mscale", "rope_mscale_all_dim")
    return dict(zip(names, (fast, slow, *weights), strict=True))


def rope_context(model: ResolvedModel, max_positions: Any) -> int | None:
    """The positions that a rotary model supports, in tokens; None if `max_positions` of its config.json is no number.

    Files of llama3 models state the extended context, those with linear scaling the original one, those with yarn
    either.
    """
    if not isinstance(max_positions, int) or isinstance(max_positions, bool) or max_positions < 1:
        return None
    if model.rope_scaling == "linear":
        return int(max_positions * model.rope_factor)
    return max(max_positions, int((model.rope_original_max_positions or 0) * model.rope_factor))


def write_rope(model: ResolvedModel) -> dict[str, Any]:
    """The keys of config.json as transformers 4 spells them; transformers 5 reads them too."""
    scaling: dict[str, Any] = {}
    if model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_factor}
    if model.rope_scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = model.rope_original_max_positions
    if model.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": model.rope_low_freq_factor, "high_freq_factor": model.rope_high_freq_factor}
    if model.rope_scaling == "yarn":
        scaling |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
        if model.rope_mscale and model.rope_mscale_all_dim:
            scaling |= {"mscale": model.rope_mscale, "mscale_all_dim": model.rope_mscale_all_dim}
    return {"rope_theta": model.rope_theta, "rope_scaling": scaling or None}
