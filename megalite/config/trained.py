"""Which parameters a run trains, by name: tune.mode, the projections that LoRA adapts, tune.freeze. No torch here.

Patterns are written one after another, divided by spaces, with * and ? as in file names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase, translate

from megalite.config.errors import ConfigError
from megalite.config.parameters import Shape, is_hidden_matrix, row_of
from megalite.config.schema import Config
from megalite.config.shapes import Projection, projections, shapes
from megalite.config.values import shown


def adapted(config: Config) -> dict[str, tuple[Projection, ...]]:
    """The linears that LoRA adapts, as layers.0.attn.qkv, each with those of its projections that have a pair."""
    if config.tune.mode != "lora":
        return {}
    patterns, found = config.tune.lora_targets.split(), {}
    fits = _matcher(patterns)
    known: dict[str, None] = {}
    linears = projections(config.model)
    for layer in range(config.model.num_layers):
        for linear, inside in linears.items():
            whole = f"layers.{layer}.{linear}"
            known |= dict.fromkeys((whole, linear, *(p.there for p in inside)))
            every = not patterns or fits(whole) or fits(linear)
            chosen = tuple(p for p in inside if every or fits(p.there))
            if chosen:
                found[whole] = chosen
    _require_all_used("tune.lora_targets", patterns, known)
    return found


def adapter_shapes(config: Config) -> dict[str, Shape]:
    """The shape of every LoRA factor by its name: a [rank, in] and b [out, rank] of each adapted projection."""
    rank = config.tune.lora_rank
    found: dict[str, Shape] = {}
    for linear, chosen in adapted(config).items():
        for p in chosen:
            found[f"{linear}.lora_{p.name}.a"] = (rank, p.columns)
            found[f"{linear}.lora_{p.name}.b"] = (p.rows, rank)
    return found


def trained(config: Config) -> dict[str, Shape]:
    """The shape of every parameter that is trained; ConfigError if a pattern fits none, or none is left to train."""
    mode, model, adapters = config.tune.mode, shapes(config.model), adapter_shapes(config)
    chosen = {
        "full": model,
        "lora": adapters,
        "bitfit": {name: shape for name, shape in model.items() if row_of(name).kind == "bias"},
        "ffn_only": {name: shape for name, shape in model.items() if fnmatchcase(name, "layers.*.mlp.*")},
    }[mode]
    if not chosen:
        raise ConfigError(
            "tune.mode=bitfit trains biases and this model has none (model.qkv_bias, linear_bias and norm=layernorm "
            "give them, as in Qwen2 and GPT-2); use tune.mode=lora or ffn_only"
        )
    patterns = config.tune.freeze.split()
    _require_all_used("tune.freeze", patterns, [*model, *adapters])
    frozen = _matcher(patterns)
    left = {name: shape for name, shape in chosen.items() if not frozen(name)}
    if not left:
        raise ConfigError(
            f"tune.freeze={shown(config.tune.freeze)} leaves nothing of tune.mode={mode} to train; freeze less"
        )
    return left


def hidden_matrices(config: Config) -> list[str]:
    """The trained parameters that Muon updates, by `is_hidden_matrix`."""
    return [name for name in trained(config) if is_hidden_matrix(name)]


def _matcher(patterns: Collection[str]) -> Callable[[str], object]:
    """Whether a name fits one of `patterns`."""
    # one expression: fnmatch keeps few compiled, and a deep model has thousands of names
    return re.compile("|".join(map(translate, patterns)) or r"(?!)").match


def _require_all_used(key: str, patterns: Collection[str], names: Collection[str]) -> None:
    for pattern in patterns:
        if not any(map(re.compile(translate(pattern)).match, names)):
            near = difflib.get_close_matches(shown(pattern), sorted(names)[:2000], n=3, cutoff=0.0)
            raise ConfigError(f"{key}: nothing is named {shown(pattern)}; near to it: {', '.join(near)}")
