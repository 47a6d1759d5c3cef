"""Hugging Face's config.json as a `ModelConfig` and back, for Llama, Mistral, Qwen2, Qwen3 and GPT-2. No torch here.

A key that changes the computation is mapped or refused by name. For a known model_type, transformers computes from the
keys of its config class and those of `NEUTRAL`; it ignores all others, and so does megalite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.config import ConfigError, Request, ResolvedModel
from megalite.config.shapes import rows_of
from megalite.exchange.hf_fields import LARGEST, Fields
from megalite.exchange.hf_rope import read_rope, write_rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# hidden_act of gated feed-forwards; activation_function of GPT-2's plain ones
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# key -> values it may have, besides absent and null. Other values change what transformers computes or loads, or belong
# to another kind of model with this model_type
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("quantization_config", "auto_map", "per_layer_config", "transformers_weights"), ()),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx"), (False,)),
    **dict.fromkeys(("is_causal", "scale_attn_weights"), (True,)),
    **dict.fromkeys(("use_bidirectional_attention", "use_qk_norm", "qk_layernorm"), (False,)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "attention_chunk_size"), ()),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "logit_scale", "logits_scaling"), (1.0,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (1.0,)),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern"), ()),
    "pruned_heads": ({},),
}
# a key of transformers' attribute_map -> the same number's own name
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# transformers' default of num_key_value_heads; for the other families the number of heads
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
MOST_LAYERS = 10_000
# settings of training, which a run may set differently
TRAINING = frozenset({"init_std", "dropout", "attention_dropout"})


def read_model(config: Mapping[str, Any], where: str) -> ResolvedModel:
    """The model that a config.json describes, resolved. Raises ValueError for a key that megalite cannot compute.

    `where`: the file's path, for messages.
    """
    fields = Fields(config, where)
    family = fields.word("model_type")
    if family not in ARCHITECTURES:
        raise fields.refuse("model_type", f"is not supported; megalite has {', '.join(ARCHITECTURES)}")
    architectures = config.get("architectures") or []
    if architectures not in ([], [ARCHITECTURES[family]]):
        raise fields.refuse("architectures", f"is not supported; for {family} only {ARCHITECTURES[family]} is")
    fields.neutral(NEUTRAL, "is not supported; megalite has plain dense decoders in fp32, bf16 and fp16")
    return _gpt2(fields) if family == "gpt2" else _llama(fields, family)


def _llama(fields: Fields, family: str) -> ResolvedModel:
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    layers = fields.whole("num_hidden_layers", high=MOST_LAYERS)
    if family == "llama" and hidden % heads:
        raise fields.refuse("num_attention_heads", f"does not divide hidden_size={hidden}")
    kv_heads = fields.whole("num_key_value_heads", KV_HEADS.get(family, heads), heads)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"does not divide num_attention_heads={heads}", kv_heads)
    if family == "qwen3":
        head_dim = fields.whole("head_dim", 128)
    else:
        head_dim = fields.whole("head_dim", hidden // heads, hidden // heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", "is odd, and rotary positions turn pairs of features", head_dim)
    bias = family in ("llama", "qwen3") and fields.flag("attention_bias", False)
    mlp_bias = family == "llama" and fields.flag("mlp_bias", False)
    if bias != mlp_bias:
        key, other = ("attention_bias", "mlp_bias") if bias else ("mlp_bias", "attention_bias")
        raise fields.refuse(key, f"without {other} is not supported; set both or neither")
    return ResolvedModel(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=fields.whole("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6, low=0),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        family="llama",
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        linear_bias=bias,
        init_std=fields.number("initializer_range", 0.02, low=0),
        activation=fields.choice("hidden_act", GATED, "silu"),
        attention_dropout=fields.number("attention_dropout", 0.0, 0.0, low=0, below=1),
        sliding_window=_window(fields, family, layers),
        **read_rope(fields),
    )


def _window(fields: Fields, family: str, layers: int) -> int | None:
    """The window of attention, in tokens, the same in every layer; None: no window."""
    null = "sliding_window" in fields.values and fields.values["sliding_window"] is None
    window, first = None, 0
    if family == "mistral":
        window = None if null else fields.whole("sliding_window", 4096)
    elif family == "llama":
        _refuse_window(fields, family)
    elif fields.flag("use_sliding_window", False):
        window = None if null else fields.whole("sliding_window", 4096)
        first = fields.whole("max_window_layers", 28, low=-LARGEST)
    kinds = fields.values.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    elif not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.refuse("layer_types", f"is not a list of num_hidden_layers={layers} words")
    if all(kind == "sliding_attention" for kind in kinds) and window:
        return window
    # Mistral's attention uses its window whatever layer_types says
    if all(kind == "full_attention" for kind in kinds) and not (family == "mistral" and window):
        return None
    key = "max_window_layers" if fields.values.get("layer_types") is None else "layer_types"
    rest = f"with {layers} layers and sliding_window={window} is not supported; all layers need the same window"
    raise fields.refuse(key, rest, fields.values.get(key, first))


def _refuse_window(fields: Fields, family: str) -> None:
    """Refuse a window: transformers' cache drops keys beyond it even in families whose attention has none."""
    if fields.values.get("sliding_window") is not None:
        raise fields.refuse("sliding_window", f"is not supported for {family}; use null")


def _gpt2(fields: Fields) -> ResolvedModel:
    values = dict(fields.values)
    for alias, key in GPT2_ALIASES.items():
        if alias in values and values.setdefault(key, values[alias]) != values[alias]:
            raise fields.refuse(
                alias, f"with {key}={values[key]} is not supported; transformers treats both as one key"
            )
    fields = Fields(values, fields.where)
    hidden, heads = fields.whole("n_embd"), fields.whole("n_head")
    if hidden % heads:
        raise fields.refuse("n_head", f"does not divide n_embd={hidden}")
    _refuse_window(fields, "gpt2")
    dropout, embedding, attention = (
        fields.number(key, 0.1, low=0, below=1) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    )
    if dropout != embedding:
        raise fields.refuse("embd_pdrop", f"with resid_pdrop={dropout} is not supported; make them equal", embedding)
    return ResolvedModel(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        num_layers=fields.whole("n_layer", high=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden_size=fields.whole("n_inner", 4 * hidden, 4 * hidden),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, low=0),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        init_std=fields.number("initializer_range", 0.02, low=0),
        norm="layernorm",
        activation=fields.choice("activation_function", PLAIN, "gelu_new"),
        family="gpt2",
        position="learned",
        max_positions=fields.whole("n_positions"),
        linear_bias=True,
        dropout=dropout,
        attention_dropout=attention,
    )


def write_model(model: ResolvedModel, max_positions: int) -> dict[str, Any]:
    """The config.json of a resolved `model`, the inverse of `read_model`. Raises ValueError if no family is like it.

    `max_positions`: max_position_embeddings of a rotary model, in tokens; learned positions have their own number.
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
        stretched = (model.rope_original_max_positions or 0) * model.rope_factor
        max_positions = max(max_positions, int(stretched))
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
        **write_rope(model),
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


def _family(m: ResolvedModel) -> str:
    """The model_type of a model. Raises ValueError naming the key in which no family is like it."""
    if m.family == "gpt2":
        family = "gpt2"
        wanted: dict[str, Any] = {"position": "learned", "norm": "layernorm", "gated": False, "linear_bias": True}
        wanted |= {
            "qk_norm": False,
            "num_kv_heads": m.num_heads,
            "head_dim": m.hidden_size // m.num_heads,
            "sliding_window": None,
        }
    else:
        family = "mistral" if m.sliding_window is not None else "llama"
        family = "qwen3" if m.qk_norm else "qwen2" if m.qkv_bias and not m.linear_bias else family
        wanted = {"position": "rope", "norm": "rmsnorm", "gated": True, "rope_fraction": 1.0}
        if family != "llama":
            wanted |= {"linear_bias": False}
        if family != "qwen2":
            wanted |= {"qkv_bias": False}
    for key, value in wanted.items():
        if getattr(m, key) != value:
            shown = f"model.activation={m.activation}" if key == "gated" else f"model.{key}={getattr(m, key)}"
            raise ValueError(
                f"{shown}: the nearest Hugging Face model is {family}, which does not support that; the model cannot "
                f"be exported (docs/hugging-face.md lists what can)"
            )
    for row in rows_of(m):
        if m.family not in row.hf:
            raise ValueError(
                f"{row.name}: the nearest Hugging Face model is {family}, which has no such parameter; such a model "
                f"cannot be exported (docs/hugging-face.md lists what can)"
            )
    return family


def _reverse(table: Mapping[str, str], value: str) -> str:
    return next(there for there, here in table.items() if here == value)


def set_by_user(request: Request, found: ResolvedModel, where: str, source: str) -> dict[str, Any]:
    """The model keys that the user has set and may set, for the model `found` in the file `where`.

    `source`: the key that names the file's folder. Raises ConfigError if the user has set another model.
    """
    chosen: dict[str, Any] = {}
    for key in sorted(request.explicit):
        section, _, name = key.partition(".")
        if section != "model" or name == "from_hf":
            continue
        asked, there = getattr(request.config.model, name), getattr(found, name)
        if name in TRAINING or name == "add_tokens":
            chosen[name] = asked
        elif asked != there and (asked is not None or name == "sliding_window"):
            raise ConfigError(f"{key}={asked}, but {where} has {there}; leave {key} to {source}")
    return chosen
