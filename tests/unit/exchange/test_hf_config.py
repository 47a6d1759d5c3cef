"""config.json to a model and back: real files of each family as published, and what is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megalite.config import Config, ModelConfig, check, resolve
from megalite.config.parameters import TABLE, Row
from megalite.exchange.hf_config import ARCHITECTURES, read_model, write_model
from megalite.exchange.hf_export import differing
from megalite.exchange.hf_fields import read_json

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 80}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
MISTRAL = {"model_type": "mistral", **SIZES}
QWEN2 = {
    "model_type": "qwen2",
    **SIZES,
    "num_key_value_heads": 8,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
QWEN3 = {"model_type": "qwen3", **SIZES, "num_key_value_heads": 8, "attention_bias": False}
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def read(config: dict[str, Any]) -> ModelConfig:
    model = read_model(config, "config.json")
    config_ = Config(model=model)
    assert resolve(config_, 1).model == model, "it is resolved already"
    return model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, {"norm_eps": 1e-6, "num_kv_heads": 8, "head_dim": 8, "rope_theta": 10000.0, "rope_scaling": "none"}),
        # Llama 3.1 as transformers 4 wrote it, and as 5 does
        (
            LLAMA
            | {
                "num_key_value_heads": 2,
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            {"num_kv_heads": 2, "rope_theta": 500000.0, "rope_scaling": "llama3", "rope_factor": 8.0}
            | {"rope_original_max_positions": 8192, "rope_high_freq_factor": 4.0},
        ),
        (LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2}},
         {"rope_scaling": "linear", "rope_theta": 7.0, "rope_factor": 2.0}),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": "linear", "rope_factor": 2.0}),
        (QWEN2 | {"rope_scaling": YARN, "rope_theta": 1e6, "tie_word_embeddings": True},
         {"rope_scaling": "yarn", "rope_theta": 1e6, "rope_beta_fast": 32.0, "tie_embeddings": True,
          "qkv_bias": True, "sliding_window": None}),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 77},
         {"rope_original_max_positions": 77}),
        (LLAMA | {"attention_bias": True, "mlp_bias": True}, {"linear_bias": True}),
        (LLAMA | {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "geglu_tanh"}),
        (MISTRAL, {"sliding_window": 4096, "num_kv_heads": 8}),
        (MISTRAL | {"sliding_window": None, "head_dim": 16}, {"sliding_window": None, "head_dim": 16}),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0}, {"sliding_window": 4096}),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 4}, {"sliding_window": None}),
        # a null window is none, whatever use_sliding_window says
        (QWEN2 | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
         {"sliding_window": None}),
        (MISTRAL | {"num_key_value_heads": None, "num_attention_heads": 4}, {"num_kv_heads": 4}),
        (QWEN2 | {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, {"sliding_window": 4096}),
        (LLAMA | {"head_dim": None, "attention_dropout": None}, {"head_dim": 8, "attention_dropout": 0.0}),
        (GPT2 | {"hidden_size": 64, "n_inner": None}, {"hidden_size": 64, "ffn_hidden_size": 256}),
        (QWEN3 | {"num_key_value_heads": 2}, {"qk_norm": True, "qkv_bias": False, "head_dim": 128}),
        (QWEN3 | {"layer_types": ["full_attention"] * 4}, {"sliding_window": None}),
        (GPT2, {"ffn_hidden_size": 256, "activation": "gelu_tanh", "tie_embeddings": True, "max_positions": 128}),
        (GPT2 | {"n_inner": 96, "activation_function": "gelu", "resid_pdrop": 0.0, "embd_pdrop": 0.0},
         {"ffn_hidden_size": 96, "activation": "gelu", "dropout": 0.0, "attention_dropout": 0.1}),
    ],
)  # fmt: skip
def test_read_and_written_back(config: dict[str, Any], expected: dict[str, Any]) -> None:
    model = read(config)
    assert {key: getattr(model, key) for key in expected} == expected
    written = write_model(model, 128)
    assert differing(model, read(written)) == []
    # transformers reads what was written, of both ages, as the same model
    opened = getattr(transformers, ARCHITECTURES[written["model_type"]]).config_class(**written)
    assert differing(model, read(opened.to_dict())) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"model_type": "mixtral"}, 'model_type="mixtral" is not supported; megalite has llama, mistral'),
        (SIZES, "model_type is missing"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA | {"quantization_config": {"bits": 4}}, 'quantization_config={"bits": 4} is not supported'),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts=8 is not supported"),
        (LLAMA | {"auto_map": {"AutoModel": "m.M"}}, "auto_map"),
        (LLAMA | {"hidden_act": "relu"}, 'hidden_act="relu" is not supported; use one of silu, gelu'),
        (GPT2 | {"activation_function": "relu"}, 'activation_function="relu"'),
        (LLAMA | {"attention_bias": True}, "attention_bias=true without mlp_bias is not supported"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias=true without attention_bias is not supported"),
        (QWEN3 | {"attention_bias": True}, "attention_bias=true"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types=[\"full_attention\", "),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 2}, "max_window_layers=2 with 4 layers"),
        (MISTRAL | {"layer_types": ["full_attention"] * 4}, "layer_types"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 'rope_type="dynamic" is not supported'),
        (LLAMA | {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, 'rope_type="longrope"'),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs between layers"),
        (LLAMA | {"rope_scaling": YARN | {"truncate": False}}, "truncate=false"),
        (LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.5}}, "attention_factor=1.5 is not supported"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        (GPT2 | {"embd_pdrop": 0.2}, "embd_pdrop=0.2 with resid_pdrop=0.1 is not supported; make them equal"),
        (GPT2 | {"n_head": 5}, "n_head=5 does not divide n_embd=64"),
        (LLAMA | {"hidden_size": "64"}, 'hidden_size="64" is not of type int'),
        (LLAMA | {"num_hidden_layers": True}, "num_hidden_layers=true is not of type int"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "vocab_size is missing; add it"),
        # a window of 0 is none here and no key at all there; a cache with a window beside attention without
        (MISTRAL | {"sliding_window": 0}, "sliding_window=0 must be from 1"),
        (MISTRAL | {"sliding_window": -4}, "sliding_window=-4 must be from 1"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0 must be from 1"),
        (LLAMA | {"sliding_window": 8}, "sliding_window=8 is not supported for llama"),
        (GPT2 | {"sliding_window": 8}, "sliding_window=8 is not supported for gpt2"),
        (MISTRAL | {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "layer_types="),
        (LLAMA | {"layer_types": ["sliding_attention"] * 4}, "layer_types="),
        (QWEN3 | {"layer_types": ["sliding_attention"] * 4}, "layer_types="),
        (QWEN3 | {"layer_types": ["full_attention"] * 3}, "layer_types="),
        (QWEN3 | {"layer_types": "full_attention"}, 'layer_types="full_attention" is not a list of'),
        (QWEN3 | {"layer_types": [["full_attention"]] * 4}, "layer_types="),
        # what transformers takes of any config, and megalite does not compute
        (LLAMA | {"is_causal": False}, "is_causal=false is not supported"),
        (LLAMA | {"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config="),
        (LLAMA | {"transformers_weights": "other.safetensors"}, 'transformers_weights="other.safetensors"'),
        (GPT2 | {"pruned_heads": {"0": [1]}}, 'pruned_heads={"0": [1]}'),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=false"),
        (GPT2 | {"hidden_size": 32}, "hidden_size=32 with n_embd=64 is not supported"),
        (LLAMA | {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
        (LLAMA | {"logits_scaling": 8.0}, "logits_scaling=8.0"),
        # absent and null are not one
        ({k: v for k, v in QWEN2.items() if k != "num_key_value_heads"}, "num_key_value_heads=32 does not divide"),
        (MISTRAL | {"num_attention_heads": 4}, "num_key_value_heads=8 does not divide num_attention_heads=4"),
        (QWEN3 | {"head_dim": None}, "head_dim=null is not of type int"),
        (LLAMA | {"rope_parameters": {"rope_theta": None}}, "rope_theta=null is not of type float"),
        (LLAMA | {"rope_scaling": {"rope_type": None, "factor": 2.0}}, "rope_type=null is not of type str"),
        (LLAMA | {"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "=null is not of type int"),
        # numbers that no model has
        *(
            (LLAMA | {key: value}, f"{key}=")
            for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers", "vocab_size")
            for value in (0, -1, 2.0, "8", True, [], 10**12)
        ),
        (LLAMA | {"num_hidden_layers": 100_000}, "num_hidden_layers=100000 must be from 1 to 10000"),
        (LLAMA | {"num_attention_heads": 3}, "num_attention_heads=3 does not divide hidden_size=64"),
        (LLAMA | {"head_dim": 7}, "head_dim=7 is odd"),
        (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps=NaN must be a finite number"),
        (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps="),
        (LLAMA | {"rope_theta": float("inf")}, "rope_theta=Infinity must be a finite number"),
        (LLAMA | {"rope_theta": 0}, "rope_theta=0 must be a finite number and above 1"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor=0.0"),
        (LLAMA | {"rope_scaling": [1]}, "rope_scaling=[1] is not an object of keys"),
        (LLAMA | {"attention_dropout": 1.0}, "=1.0 must be a finite number and at least 0 and below 1"),
        (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures="),
        (LLAMA | {"hidden_act": "x" * 1000}, "..."),
    ],
)  # fmt: skip
def test_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: ") as error:
        read_model(config, "config.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_yarn_with_the_usual_attention_factor_is_taken() -> None:
    usual = 0.1 * 1.3862943611198906 + 1  # ln 4
    assert read(LLAMA | {"rope_scaling": YARN | {"attention_factor": usual}}).rope_scaling == "yarn"


PLAIN = resolve(Config(model=ModelConfig()), 1).model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "layernorm"}, "model.norm=layernorm: the nearest Hugging Face model is llama"),
        ({"activation": "gelu"}, "model.activation=gelu"),
        ({"rope_fraction": 0.5}, "model.rope_fraction=0.5"),
        ({"qk_norm": True, "qkv_bias": True}, "model.qkv_bias=True: the nearest Hugging Face model is qwen3"),
        ({"sliding_window": 4, "linear_bias": True}, "model.linear_bias=True: the nearest Hugging Face model is mist"),
        (
            {"position": "learned", "family": "gpt2", "max_positions": 9},
            "model.norm=rmsnorm: the nearest Hugging Face model is gpt2",
        ),
        (
            {"position": "learned", "max_positions": 9},
            "model.position=learned: the nearest Hugging Face model is llama",
        ),
        ({"family": "gpt2"}, "model.position=rope: the nearest Hugging Face model is gpt2"),
    ],
)
def test_a_model_of_no_family_is_not_exported(changes: dict[str, Any], message: str) -> None:
    model = dataclasses.replace(PLAIN, **changes)
    check(resolve(Config(model=model, train=dataclasses.replace(Config().train, seq_len=8)), 1), 1)
    with pytest.raises(ValueError, match="cannot be exported") as error:
        write_model(model, 128)
    assert message in str(error.value)


def test_a_parameter_that_no_family_has_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.config.shapes.TABLE", (*TABLE, Row("mlp.scale", "layer", ("ffn",), "scale")))
    with pytest.raises(ValueError, match=r"mlp\.scale: the nearest Hugging Face model is llama, which has no such par"):
        write_model(PLAIN, 128)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="no such file"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds list, not an object"):
        read_json(path)
