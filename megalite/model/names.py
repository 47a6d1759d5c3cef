"""Every parameter's name and shape, here and in Hugging Face's files of Llama and its relatives, and of GPT-2.

No torch here, so that a folder of the wrong weights is told at once. What happens to the values stands in hf.py.
"""

from __future__ import annotations

import re

from megalite.config import ModelConfig
from megalite.config import trained as tune

Shape = tune.Shape

# module -> the modules there whose rows it holds, joined; of a layer, within its layer
QKV, GATE_UP = "attn.qkv", "mlp.gate_up"
_LLAMA = {
    "embed": ("model.embed_tokens",),
    "loss_head.norm": ("model.norm",),
    "loss_head.head": ("lm_head",),
    "layers": ("model.layers",),
    "attn_norm": ("input_layernorm",),
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
}
# GPT-2 keeps query, key and value in one matrix, and all matrices of its layers as [in, out]
_GPT2 = {
    "embed": ("transformer.wte",),
    "pos_embed": ("transformer.wpe",),
    "loss_head.norm": ("transformer.ln_f",),
    "loss_head.head": ("lm_head",),
    "layers": ("transformer.h",),
    "attn_norm": ("ln_1",),
    QKV: ("attn.c_attn",),
    "attn.out": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}


def global_shapes(model: ModelConfig) -> dict[str, Shape]:
    """megalite's name and whole shape of every parameter of the model; a tied head has none of its own."""
    return tune.shapes(model)


def global_names(model: ModelConfig) -> list[str]:
    """megalite's name of every parameter of the whole model; a tied head has none of its own."""
    return list(global_shapes(model))


def hf_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Hugging Face's name and shape of every parameter of the model; `lm_head.weight` is left out where it is tied."""
    groups, queries, head_dim = grouping(model)
    shapes: dict[str, Shape] = {}
    for name, shape in global_shapes(model).items():
        there = names_there(name, model)
        rows = [shape[0] // len(there)] * len(there)
        if f".{QKV}." in name and len(there) > 1:
            rows = [groups * count * head_dim for count in (queries, 1, 1)]
        for other, count in zip(there, rows, strict=True):
            local = (count, *shape[1:])
            shapes[other] = local[::-1] if is_turned(name, len(shape), model) else local
    return shapes


def hf_names(model: ModelConfig) -> list[str]:
    """Hugging Face's name of every parameter of the whole model; `lm_head.weight` is left out where it is tied."""
    return list(hf_shapes(model))


def is_turned(name: str, dims: int, model: ModelConfig) -> bool:
    """Whether the parameter `name` is [out, in] here and [in, out] there: the matrices of GPT-2's layers."""
    return model.position == "learned" and name.startswith("layers.") and dims == 2


def names_there(name: str, model: ModelConfig) -> list[str]:
    """Hugging Face's names of the tensors that the parameter `name` joins, in its order of rows."""
    table = _GPT2 if model.position == "learned" else _LLAMA
    module, _, leaf = name.rpartition(".")
    prefix = ""
    if layer := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        prefix, module = f"{table['layers'][0]}.{layer[1]}.", layer[2]
    if module not in table or module == "layers" or leaf not in ("weight", "bias"):
        raise ValueError(f"{name!r} has no counterpart in Hugging Face's Llama, Qwen2, Qwen3 or GPT-2")
    return [f"{prefix}{there}.{leaf}" for there in table[module]]


def grouping(model: ModelConfig) -> tuple[int, int, int]:
    """kv groups, query heads of each, head size."""
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    return model.num_kv_heads, model.num_heads // model.num_kv_heads, model.head_dim
