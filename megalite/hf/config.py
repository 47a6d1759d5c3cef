"""Hugging Face's config.json as a `ModelConfig` and back, for Llama, Mistral, Qwen2, Qwen3 and GPT-2. No torch here.

A key that changes the computation is mapped or refused by name. Of a known model_type, transformers computes from the
keys of its own config class alone; all others it carries along, and so does megalite.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from megalite.config import ModelConfig

T = TypeVar("T")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# hidden_act -> the gated feed-forward; activation_function -> the plain one
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# key -> what it may be beside absent and null, where any other value computes something that is not built
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "auto_map": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "partial_rotary_factor": (1.0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
}
# settings of training, which a run may choose anew
TRAINING = frozenset({"init_std", "dropout", "attention_dropout"})


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a folder that holds a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, not an object of keys; fetch the file again")
    return found


class _Keys:
    """The keys of one config.json, typed as they are read; every ValueError names file, key and value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def refuse(self, key: str, value: Any, why: str) -> ValueError:
        return ValueError(f"{self.where}: {key}={json.dumps(value, default=str)} {why}")

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`, `default` where it is absent or null; without a default that is an error."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{self.where}: {key} is missing; a model of this family has it")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refuse(key, value, f"is not of type {kind.__name__}")
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        value = self.get(key, str, default)
        if value not in choices:
            raise self.refuse(key, value, f"is not built; megalite has {', '.join(choices)}")
        return choices[value]


def read_model(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes, resolved. ValueError for what megalite does not compute."""
    keys = _Keys(config, where)
    family = keys.get("model_type", str)
    if family not in ARCHITECTURES:
        raise keys.refuse("model_type", family, f"is not built; megalite has {', '.join(ARCHITECTURES)}")
    for architecture in keys.get("architectures", list, []):
        if architecture != ARCHITECTURES[family]:
            raise keys.refuse("architectures", [architecture], f"is not built; of {family} {ARCHITECTURES[family]} is")
    for key, allowed in NEUTRAL.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            raise keys.refuse(key, value, "is not built; megalite has dense decoders in fp32, bf16 and fp16 only")
    return _gpt2(keys) if family == "gpt2" else _llama(keys, family)


def _llama(keys: _Keys, family: str) -> ModelConfig:
    hidden, heads = keys.get("hidden_size", int), keys.get("num_attention_heads", int)
    layers = keys.get("num_hidden_layers", int)
    # what transformers takes where an old file says nothing
    kv_heads = keys.get("num_key_value_heads", int, {"mistral": 8}.get(family, heads))
    head_dim = keys.get("head_dim", int, 128 if family == "qwen3" else hidden // heads)
    bias = family in ("llama", "qwen3") and keys.get("attention_bias", bool, False)
    mlp_bias = family == "llama" and keys.get("mlp_bias", bool, False)
    if bias != mlp_bias:
        key, other = ("attention_bias", "mlp_bias") if bias else ("mlp_bias", "attention_bias")
        raise keys.refuse(key, True, f"without {other} is not built; a model has both or neither")
    return ModelConfig(
        vocab_size=keys.get("vocab_size", int),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=keys.get("intermediate_size", int),
        norm_eps=keys.get("rms_norm_eps", float, 1e-6),
        tie_embeddings=keys.get("tie_word_embeddings", bool, False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        linear_bias=bias,
        init_std=keys.get("initializer_range", float, 0.02),
        activation=keys.choice("hidden_act", GATED, "silu"),
        attention_dropout=keys.get("attention_dropout", float, 0.0),
        sliding_window=_window(keys, family, layers),
        **_rope(keys),
    )


def _window(keys: _Keys, family: str, layers: int) -> int | None:
    """Keys that a query sees: the same in every layer, or ValueError."""
    if family == "llama":
        return None
    kinds = set(keys.get("layer_types", list, []))
    if family == "mistral":
        if kinds - {"sliding_attention"}:
            raise keys.refuse("layer_types", sorted(kinds), "is not built; megalite has one window for all layers")
        return 4096 if "sliding_window" not in keys.values else keys.get("sliding_window", int, 0) or None
    window = keys.get("sliding_window", int, 4096) if keys.get("use_sliding_window", bool, False) else None
    first = keys.get("max_window_layers", int, 28)
    if not kinds:
        kinds = {"sliding_attention" if window is not None and i >= first else "full_attention" for i in range(layers)}
    if kinds == {"sliding_attention"} and window is not None:
        return window
    if kinds != {"full_attention"}:
        key, value = ("layer_types", sorted(kinds)) if "layer_types" in keys.values else ("max_window_layers", first)
        rest = f"with {layers} layers and sliding_window={window} is not built; megalite has one window for all layers"
        raise keys.refuse(key, value, rest)
    return None


def _rope(keys: _Keys) -> dict[str, Any]:
    """transformers 5 writes rope_parameters; before, it was rope_theta and, where the context is long, rope_scaling."""
    name = "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    found = keys.values.get(name) or {}
    if not isinstance(found, Mapping):
        raise keys.refuse(name, found, "is not an object of keys")
    rope = _Keys(found, f"{keys.where}: {name}")
    theta = rope.get("rope_theta", float, keys.get("rope_theta", float, 10000.0))
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if any(isinstance(value, Mapping) for value in found.values()):
        raise keys.refuse(name, found, "differs between layers, which is not built")
    if rope.get("partial_rotary_factor", float, 1.0) != 1.0:
        raise rope.refuse("partial_rotary_factor", found["partial_rotary_factor"], "is not built for this family")
    if kind == "default":
        return {"rope_theta": theta}
    if kind not in ("linear", "llama3", "yarn"):
        raise rope.refuse("rope_type", kind, "is not built; megalite has default, linear, llama3, yarn")
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": rope.get("factor", float)}
    if kind == "linear":
        return fields
    length = rope.get("original_max_position_embeddings", int, keys.values.get("max_position_embeddings"))
    fields["rope_original_max_positions"] = keys.get("original_max_position_embeddings", int, length)
    if kind == "llama3":
        fields["rope_low_freq_factor"] = rope.get("low_freq_factor", float)
        fields["rope_high_freq_factor"] = rope.get("high_freq_factor", float)
        return fields
    fields["rope_beta_fast"] = rope.get("beta_fast", float, 0.0) or 32.0
    fields["rope_beta_slow"] = rope.get("beta_slow", float, 0.0) or 1.0
    fields["rope_mscale"] = rope.get("mscale", float, 0.0)
    fields["rope_mscale_all_dim"] = rope.get("mscale_all_dim", float, 0.0)
    _check_yarn(rope, fields)
    return fields


def _check_yarn(rope: _Keys, fields: Mapping[str, Any]) -> None:
    if not rope.get("truncate", bool, True):
        raise rope.refuse("truncate", False, "is not built; megalite rounds yarn's ramp to whole features")

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(fields["rope_factor"]) + 1.0 if fields["rope_factor"] > 1 else 1.0

    m, all_dim = fields["rope_mscale"], fields["rope_mscale_all_dim"]
    usual = mscale(m) / mscale(all_dim) if m and all_dim else mscale(1.0)
    given = rope.get("attention_factor", float, usual)
    if not math.isclose(given, usual, rel_tol=1e-6):
        raise rope.refuse("attention_factor", given, f"is not built; from factor and mscale it would be {usual:.6f}")


def _gpt2(keys: _Keys) -> ModelConfig:
    hidden, heads = keys.get("n_embd", int), keys.get("n_head", int)
    if hidden % heads:
        raise keys.refuse("n_head", heads, f"does not divide n_embd={hidden}")
    dropout, embedding = keys.get("resid_pdrop", float, 0.1), keys.get("embd_pdrop", float, 0.1)
    if dropout != embedding:
        raise keys.refuse("embd_pdrop", embedding, f"beside resid_pdrop={dropout} is not built; make them equal")
    return ModelConfig(
        vocab_size=keys.get("vocab_size", int),
        hidden_size=hidden,
        num_layers=keys.get("n_layer", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=keys.get("n_inner", int, 4 * hidden),
        norm_eps=keys.get("layer_norm_epsilon", float, 1e-5),
        tie_embeddings=keys.get("tie_word_embeddings", bool, True),
        init_std=keys.get("initializer_range", float, 0.02),
        norm="layernorm",
        activation=keys.choice("activation_function", PLAIN, "gelu_new"),
        position="learned",
        max_positions=keys.get("n_positions", int),
        linear_bias=True,
        dropout=dropout,
        attention_dropout=keys.get("attn_pdrop", float, 0.1),
    )


def write_model(model: ModelConfig, max_positions: int) -> dict[str, Any]:
    """The config.json of a resolved `model`, the inverse of `read_model`; ValueError where no family is like it.

    `max_positions`: the context that a rotary model is said to have; learned positions have their own number.
    """
    family = _family(model)
    common = {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if family == "gpt2":
        return common | {
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_heads,
            "n_inner": model.ffn_hidden_size,
            "n_positions": model.max_positions,
            "layer_norm_epsilon": model.norm_eps,
            "activation_function": _reverse(PLAIN, model.activation),
            **dict.fromkeys(("resid_pdrop", "embd_pdrop"), model.dropout),
            "attn_pdrop": model.attention_dropout,
        }
    if model.rope_scaling in ("llama3", "yarn"):
        assert model.rope_original_max_positions is not None
        max_positions = max(max_positions, int(model.rope_original_max_positions * model.rope_factor))
    config = common | {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_hidden_size,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": _reverse(GATED, model.activation),
        "max_position_embeddings": max_positions,
        "attention_dropout": model.attention_dropout,
        **_write_rope(model),
    }
    if family == "llama":
        config |= {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}
    if family == "mistral":
        config["sliding_window"] = model.sliding_window
    if family in ("qwen2", "qwen3"):
        windowed = model.sliding_window is not None
        config |= {"use_sliding_window": windowed, "sliding_window": model.sliding_window}
        config["max_window_layers"] = 0 if windowed else model.num_layers
    return config


def _family(m: ModelConfig) -> str:
    """The family that a model is one of; ValueError naming the key that it does not have."""
    if m.position == "learned":
        family = "gpt2"
        wanted: dict[str, Any] = {"norm": "layernorm", "gated": False, "linear_bias": True, "qk_norm": False}
        wanted |= {"num_kv_heads": m.num_heads, "head_dim": m.hidden_size // m.num_heads, "sliding_window": None}
    else:
        family = "mistral" if m.sliding_window is not None else "llama"
        family = "qwen3" if m.qk_norm else "qwen2" if m.qkv_bias and not m.linear_bias else family
        wanted = {"norm": "rmsnorm", "gated": True, "rope_fraction": 1.0}
        if family != "llama":
            wanted |= {"linear_bias": False}
        if family != "qwen2":
            wanted |= {"qkv_bias": False}
    for key, value in wanted.items():
        if getattr(m, key) != value:
            shown = f"model.activation={m.activation}" if key == "gated" else f"model.{key}={getattr(m, key)}"
            raise ValueError(
                f"{shown}: the nearest Hugging Face model is {family}, which does not have that; such a model cannot "
                f"be exported (docs/hugging-face.md lists what can)"
            )
    return family


def _reverse(table: Mapping[str, str], value: str) -> str:
    return next(there for there, here in table.items() if here == value)


def _write_rope(model: ModelConfig) -> dict[str, Any]:
    """The spelling of transformers 4, which 5 reads too."""
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


def differing(a: ModelConfig, b: ModelConfig) -> list[str]:
    """The keys in which two models compute differently."""
    ignored = TRAINING | {"from_hf", "add_tokens"}
    return [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.name not in ignored and getattr(a, f.name) != getattr(b, f.name)
    ]
