"""Which parameters a run trains, by tune.mode, tune.lora_targets and tune.freeze. No torch here.

Patterns use * and ? as in file names; spaces separate them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from functools import lru_cache

from megalite.config.errors import ConfigError
from megalite.config.model import ResolvedModel
from megalite.config.parameters import Shape, is_hidden_matrix, row_of
from megalite.config.schema import TuneConfig
from megalite.config.shapes import Projection, projections, shapes
from megalite.config.values import shown


@dataclass(frozen=True)
class NamedShapes:
    """Shapes of parameters by name: all of the `model`, LoRA's `factors` beside them, and those that are `trained`."""

    model: Mapping[str, Shape]
    factors: Mapping[str, Shape]
    trained: Mapping[str, Shape]

    @property
    def hidden(self) -> list[str]:
        """The trained matrices of the blocks, which Muon updates."""
        return [name for name in self.trained if is_hidden_matrix(name)]


@lru_cache(maxsize=8)
def named_shapes(model: ResolvedModel, tune: TuneConfig) -> NamedShapes:
    """The shapes of a model and of what `tune` adds to it and trains of it.

    Cached: no topology changes them, and a plan compares many. Raises ConfigError if a pattern matches nothing, or
    nothing is left to train.
    """
    factors = _factors(model, tune)
    return NamedShapes(shapes(model), factors, _trained(shapes(model), factors, tune))


def adapted(model: ResolvedModel, tune: TuneConfig) -> dict[str, tuple[Projection, ...]]:
    """The linears that LoRA adapts, such as layers.0.attn.qkv, each with its projections that have factors.

    Raises ConfigError if a pattern of tune.lora_targets matches nothing.
    """
    if tune.mode != "lora":
        return {}
    patterns, found = tune.lora_targets.split(), {}
    fits = _matcher(patterns)
    known: dict[str, None] = {}
    linears = projections(model)
    for layer in range(model.num_layers):
        for linear, inside in linears.items():
            whole = f"layers.{layer}.{linear}"
            known |= dict.fromkeys((whole, linear, *(p.there for p in inside)))
            every = not patterns or fits(whole) or fits(linear)
            chosen = tuple(p for p in inside if every or fits(p.there))
            if chosen:
                found[whole] = chosen
    _require_all_used("tune.lora_targets", patterns, known)
    return found


def _factors(model: ResolvedModel, tune: TuneConfig) -> dict[str, Shape]:
    """LoRA's factors: a [rank, in] and b [out, rank] of each adapted projection."""
    found: dict[str, Shape] = {}
    for linear, chosen in adapted(model, tune).items():
        for p in chosen:
            found[f"{linear}.lora_{p.name}.a"] = (tune.lora_rank, p.columns)
            found[f"{linear}.lora_{p.name}.b"] = (p.rows, tune.lora_rank)
    return found


def _trained(model: Mapping[str, Shape], factors: Mapping[str, Shape], tune: TuneConfig) -> Mapping[str, Shape]:
    chosen = {
        "full": model,
        "lora": factors,
        "bitfit": {name: shape for name, shape in model.items() if row_of(name).kind == "bias"},
        "ffn_only": {name: shape for name, shape in model.items() if fnmatchcase(name, "layers.*.mlp.*")},
    }[tune.mode]
    if not chosen:
        raise ConfigError(
            "tune.mode=bitfit trains biases and this model has none (model.qkv_bias, linear_bias and norm=layernorm "
            "add them, as in Qwen2 and GPT-2); use tune.mode=lora or ffn_only"
        )
    patterns = tune.freeze.split()
    _require_all_used("tune.freeze", patterns, [*model, *factors])
    frozen = _matcher(patterns)
    left = {name: shape for name, shape in chosen.items() if not frozen(name)}
    if not left:
        raise ConfigError(
            f"tune.freeze={shown(tune.freeze)} leaves nothing of tune.mode={tune.mode} to train; freeze less"
        )
    return left


def _matcher(patterns: Collection[str]) -> Callable[[str], object]:
    """A function of a name that is true if the name matches one of `patterns`."""
    # one expression: fnmatch keeps few compiled, and a deep model has thousands of names
    return re.compile("|".join(map(translate, patterns)) or r"(?!)").match


def _require_all_used(key: str, patterns: Collection[str], names: Collection[str]) -> None:
    for pattern in patterns:
        if not any(map(re.compile(translate(pattern)).match, names)):
            near = difflib.get_close_matches(shown(pattern), sorted(names)[:2000], n=3, cutoff=0.0)
            raise ConfigError(f"{key}: {shown(pattern)} matches nothing; similar names: {', '.join(near)}")
