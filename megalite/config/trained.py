"""Which parameters a run trains, by name: tune.mode, the projections that LoRA adapts, tune.freeze. No torch here.

Patterns are written one after another, divided by spaces, with * and ? as in file names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate

from megalite.config.errors import ConfigError
from megalite.config.schema import Config, ModelConfig
from megalite.config.values import shown

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Projection:
    """A matrix of Hugging Face's inside one of our linears: `rows` outputs of `columns` inputs, `there` its name."""

    name: str
    there: str
    rows: int
    columns: int


def shapes(m: ModelConfig) -> dict[str, Shape]:
    """The shape of every parameter of the whole model by its name; a tied head has none of its own."""
    h, d = m.hidden_size, m.head_dim or m.hidden_size // m.num_heads
    ends = ["weight"] + ["bias"] * (m.norm == "layernorm")
    biased = {"attn.qkv": m.qkv_bias or m.linear_bias}
    layer: dict[str, Shape] = {}
    linears = {name: (sum(p.rows for p in found), found[0].columns) for name, found in projections(m).items()}

    def norm(name: str) -> None:
        layer.update({f"{name}.{end}": (h,) for end in ends})

    def linear(name: str) -> None:
        layer[f"{name}.weight"] = linears[name]
        if biased.get(name, m.linear_bias):
            layer[f"{name}.bias"] = linears[name][:1]

    norm("attn_norm")
    linear("attn.qkv")
    layer.update({"attn.q_norm.weight": (d,), "attn.k_norm.weight": (d,)} if m.qk_norm else {})
    linear("attn.out")
    norm("mlp_norm")
    linear("mlp.gate_up" if m.gated else "mlp.up")
    linear("mlp.down")
    found: dict[str, Shape] = {"embed.weight": (m.vocab_size, h)}
    if m.position == "learned":
        found["pos_embed.weight"] = (m.max_positions or 0, h)
    found |= {f"layers.{i}.{name}": shape for i in range(m.num_layers) for name, shape in layer.items()}
    found |= {f"loss_head.norm.{end}": (h,) for end in ends}
    return found | ({} if m.tie_embeddings else {"loss_head.head.weight": (m.vocab_size, h)})


def projections(m: ModelConfig) -> dict[str, tuple[Projection, ...]]:
    """The linears of a block, each with the projections whose rows it holds; GPT-2 keeps query, key, value in one."""
    h, f, d = m.hidden_size, m.ffn_hidden_size, m.head_dim or m.hidden_size // m.num_heads
    width, kv = m.num_heads * d, (m.num_kv_heads or m.num_heads) * d
    if m.position == "learned":
        qkv: tuple[Projection, ...] = (Projection("qkv", "c_attn", width + 2 * kv, h),)
        there = {"o": "c_proj", "up": "c_fc", "down": "c_proj"}
    else:
        qkv = (Projection("q", "q_proj", width, h), Projection("k", "k_proj", kv, h), Projection("v", "v_proj", kv, h))
        there = {"o": "o_proj", "up": "up_proj", "down": "down_proj"}
    up = Projection("up", there["up"], f, h)
    return {
        "attn.qkv": qkv,
        "attn.out": (Projection("o", there["o"], h, width),),
        **({"mlp.gate_up": (Projection("gate", "gate_proj", f, h), up)} if m.gated else {"mlp.up": (up,)}),
        "mlp.down": (Projection("down", there["down"], h, f),),
    }


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
        "bitfit": {name: shape for name, shape in model.items() if name.endswith(".bias")},
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
    """Trained matrices of the model's blocks, which Muon updates: no embeddings, no head, no LoRA factors."""
    model = shapes(config.model)
    return [name for name in trained(config) if name in model and name.startswith("layers.") and len(model[name]) == 2]


def _matcher(patterns: Collection[str]) -> Callable[[str], object]:
    """Whether a name fits one of `patterns`."""
    # one expression: fnmatch keeps few compiled, and a deep model has thousands of names
    return re.compile("|".join(map(translate, patterns)) or r"(?!)").match


def _require_all_used(key: str, patterns: Collection[str], names: Collection[str]) -> None:
    for pattern in patterns:
        if not any(map(re.compile(translate(pattern)).match, names)):
            near = difflib.get_close_matches(shown(pattern), sorted(names)[:2000], n=3, cutoff=0.0)
            raise ConfigError(f"{key}: nothing is named {shown(pattern)}; near to it: {', '.join(near)}")
