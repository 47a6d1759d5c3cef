"""The map of names and rows between megalite and Hugging Face; test_parity.py says that the values mean the same."""

import dataclasses

import pytest
import torch

from megalite.config import ModelConfig, ResolvedModel, resolve_model
from megalite.config.shapes import shapes
from megalite.model.decoder import Decoder
from megalite.model.layouts import from_hf, to_hf
from megalite.model.names import hf_shapes

SMALL = ModelConfig(vocab_size=11, hidden_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=2)
KINDS = {
    "llama": SMALL,
    "qwen2": dataclasses.replace(SMALL, qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True),
    "gpt2": dataclasses.replace(
        SMALL, position="learned", max_positions=9, norm="layernorm", activation="gelu_tanh", linear_bias=True
    ),
    "stablelm": dataclasses.replace(SMALL, norm="layernorm", qkv_bias=True),
    "mqa": dataclasses.replace(SMALL, num_kv_heads=1),
    "mha": dataclasses.replace(SMALL, num_kv_heads=None),
}
MODELS = {name: resolve_model(model, 8) for name, model in KINDS.items()}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_round_trip(model: ResolvedModel) -> None:
    decoder = Decoder(model, range(model.num_layers))
    parameters = {name: p.detach() for name, p in decoder.named_parameters()}
    assert sorted(shapes(model)) == sorted(parameters)

    there = {}
    for name, whole in parameters.items():
        there |= to_hf(name, whole.normal_(), model)
    assert sorted(there) == sorted(hf_shapes(model))
    assert all(t.is_contiguous() for t in there.values())  # what safetensors takes
    assert sum(t.numel() for t in there.values()) == sum(p.numel() for p in parameters.values())
    for name, whole in parameters.items():
        assert torch.equal(from_hf(there.__getitem__, name, model), whole)


@pytest.mark.parametrize(("name", "family"), [("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")])
def test_names_and_shapes_are_those_of_transformers(name: str, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    c = MODELS[name]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.ffn_hidden_size,
        tie_word_embeddings=c.tie_embeddings,
        pad_token_id=None,
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        decoder = Decoder(c, range(c.num_layers))
    here = {}
    for key, whole in decoder.named_parameters():
        here |= {n: t.shape for n, t in to_hf(key, whole, c).items()}
    assert here == {n: p.shape for n, p in model.named_parameters()}


def test_rows_by_kv_group() -> None:
    # two groups of [two query heads, key, value], heads of two rows
    rows = torch.arange(16.0).unsqueeze(1).expand(16, 12)
    found = to_hf("layers.7.attn.qkv.weight", rows, MODELS["llama"])
    prefix = "model.layers.7.self_attn."
    assert {name: t[:, 0].tolist() for name, t in found.items()} == {
        prefix + "q_proj.weight": [0, 1, 2, 3, 8, 9, 10, 11],
        prefix + "k_proj.weight": [4, 5, 12, 13],
        prefix + "v_proj.weight": [6, 7, 14, 15],
    }
    bias = to_hf("layers.0.attn.qkv.bias", rows[:, 0], MODELS["llama"])["model.layers.0.self_attn.k_proj.bias"]
    assert bias.tolist() == [4, 5, 12, 13]
    gate, up = to_hf("layers.0.mlp.gate_up.weight", rows, MODELS["llama"]).values()
    assert (gate[0, 0], up[0, 0]) == (0, 8)


@pytest.mark.parametrize("name", ["layers.0.attn.rotary.weight", "head.weight", "layers.x.mlp.down.weight", ""])
def test_a_name_without_counterpart_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no counterpart"):
        to_hf(name, torch.zeros(1), MODELS["llama"])
