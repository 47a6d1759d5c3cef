"""Every family of Hugging Face's, at two topologies: loss and all gradients equal its model's, in float64."""

import functools
from typing import Any

import pytest
import torch
from formulas import GPT2, LLAMA3, YARN, Weights, largest_error, make_config, seen_keys
from parity import TOLERANCE, batches, rms_norm
from torch import Tensor

from megalite.config import ModelConfig
from megalite.config.shapes import shapes
from megalite.model.layouts import from_hf

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "llama3": ("Llama", LLAMA3 | {"head_dim": 16}),
    "linear": ("Llama", {"rope_scaling": "linear", "rope_factor": 3.0}),
    "yarn": ("Llama", YARN | {"head_dim": 16}),
    "yarn-mscale": ("Llama", YARN | {"rope_mscale": 1.4, "rope_mscale_all_dim": 0.7, "rope_beta_fast": 4.0}),
    "biases": ("Llama", {"linear_bias": True, "activation": "geglu_tanh"}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"sliding_window": 3, "qkv_bias": True}),
    "stablelm": ("StableLm", {"norm": "layernorm", "rope_fraction": 0.34, "qkv_bias": True}),
}


def hf_config(family: str, c: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of Hugging Face's configuration: the map that docs/model-options.md states."""
    if family == "GPT2":
        return {
            "vocab_size": c.vocab_size,
            "n_positions": c.max_positions,
            "n_embd": c.hidden_size,
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_inner": c.ffn_hidden_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm_eps,
            "tie_word_embeddings": c.tie_embeddings,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": c.rope_theta,
        "partial_rotary_factor": c.rope_fraction,
    }
    if c.rope_scaling != "none":
        rope |= {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = c.rope_original_max_positions
    if c.rope_scaling == "llama3":
        rope |= {"low_freq_factor": c.rope_low_freq_factor, "high_freq_factor": c.rope_high_freq_factor}
    if c.rope_scaling == "yarn":
        rope |= {"beta_fast": c.rope_beta_fast, "beta_slow": c.rope_beta_slow}
        rope |= {"mscale": c.rope_mscale or None, "mscale_all_dim": c.rope_mscale_all_dim or None}
    length = int((c.rope_original_max_positions or 64) * c.rope_factor)
    windows = {"sliding_window": c.sliding_window}
    if family == "Qwen2":
        windows |= {"use_sliding_window": True, "max_window_layers": 0}
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_hidden_size,
        "hidden_act": {"swiglu": "silu", "geglu_tanh": "gelu_pytorch_tanh"}[c.activation],
        "rms_norm_eps": c.norm_eps,
        "layer_norm_eps": c.norm_eps,
        "max_position_embeddings": length,
        "rope_parameters": rope,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.linear_bias,
        "mlp_bias": c.linear_bias,
        "use_qkv_bias": c.qkv_bias,
        "pad_token_id": None,
        **windows,
    }


@functools.cache
def hf_reference(name: str, isolated: bool) -> tuple[Weights, float, Weights]:
    transformers = pytest.importorskip("transformers")
    family, options = FAMILIES[name]
    c = make_config(options, {}).model
    config = getattr(transformers, f"{family}Config")(**hf_config(family, c), attn_implementation="sdpa")
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    model = getattr(transformers, model_class)(config).double().train()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)  # theirs computes in float32
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in parameters.items():
            norm = "norm" in key or "ln_" in key
            parameter.normal_(1.0 if norm and key.endswith("weight") else 0.0, 0.2, generator=generator)
    loss = torch.zeros((), dtype=torch.float64)
    for mb in batches(isolated):
        mask = None
        if isolated:  # without one, theirs makes the window's mask itself
            seen = seen_keys(mb, isolated, c.sliding_window)
            mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[:, None]
        logits = model(mb.tokens, attention_mask=mask, position_ids=mb.positions, use_cache=False).logits
        ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), mb.labels.flatten(), reduction="none")
        loss = loss + (ce * mb.loss_mask.flatten()).sum()
    loss.backward()

    def mapped(values: dict[str, Tensor | None]) -> Weights:
        assert None not in values.values()
        return {key: from_hf(values.__getitem__, key, c) for key in shapes(c)}

    weights = mapped({key: p.detach() for key, p in parameters.items()})
    return weights, loss.item(), mapped({key: p.grad for key, p in parameters.items()})


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "sp": True, "pp": 2}], ids=["tp1", "tp2-sp-pp2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, parallel: dict[str, Any]) -> None:
    for isolated in (False, True) if name in ("gpt2", "mistral") else (False,):
        weights, loss, grads = hf_reference(name, isolated)
        assert largest_error(make_config(FAMILIES[name][1], parallel), weights, isolated, loss, grads) <= TOLERANCE
