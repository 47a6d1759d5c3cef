"""Which adapter_config.json is plain LoRA: what peft writes at neutral values, and each key that says otherwise."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megalite.exchange.adapter_config import FILE, FREE, NEUTRAL, READ, read_settings, require_targets, tune_config

peft = pytest.importorskip("peft")
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
                         "target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": False}  # fmt: skip
MODULES = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "k_proj", "v_proj")]


def write(folder: Path, **keys: Any) -> Path:
    (folder / FILE).write_text(json.dumps(PLAIN | keys))
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tune_config(read_settings(folder))
    assert str(error.value).startswith(f"{folder / FILE}: ")
    assert "\n" not in str(error.value)


def test_every_key_of_peft_is_known() -> None:
    written = set(peft.LoraConfig().to_dict())
    assert written - {*NEUTRAL, *FREE, *READ} == set()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"lora_alpha": 16.0, "lora_dropout": 0},
        # peft 0.2 and 0.4
        {"enable_lora": None, "merge_weights": False, "modules_to_save": None, "layers_to_transform": None},
        {"init_lora_weights": True, "layers_pattern": None, "revision": None, "task_type": "CAUSAL_LM"},
        # peft 0.10 and 0.17
        {"rank_pattern": {}, "alpha_pattern": {}, "megatron_config": None, "megatron_core": "megatron.core"},
        {"loftq_config": {}, "use_rslora": False, "use_dora": False, "layer_replication": None, "corda_config": None},
        {"use_qalora": False, "qalora_group_size": 16, "target_parameters": None, "trainable_token_indices": None},
        {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "parent_library": "x"}, "peft_version": "0.18.0"},
        # of a peft to come
        {"some_config": None},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
        # peft reads these for their own beginnings only
        {"loftq_config": {"loftq_bits": 4}, "lora_ga_config": {"scale": "stable"}},
    ],
)
def test_plain_lora_is_taken(tmp_path: Path, keys: dict[str, Any]) -> None:
    tune = tune_config(read_settings(write(tmp_path, **keys)))
    assert (tune.mode, tune.lora_rank, tune.lora_dropout) == ("lora", 4, 0.0)


def test_what_peft_itself_writes(tmp_path: Path) -> None:
    peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=["q_proj"]).save_pretrained(tmp_path)
    tune = tune_config(read_settings(tmp_path))
    assert (tune.lora_rank, tune.lora_alpha, tune.lora_dropout) == (3, 5.0, 0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", name) for name in ("pissa", "pissa_niter_16", "olora", "OLoRA", "loftq", "corda")),
        *(("init_lora_weights", name) for name in ("mica", "lora_ga", "something", 1, None, [])),
        ("alora_invocation_tokens", [5, 6]),
        ("alora_invocation_tokens", []),
        ("use_dora", True),
        ("use_rslora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("ensure_weight_tying", True),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("bias", None),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("layers_to_transform", [0]),
        ("layers_to_transform", 0),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("megatron_config", {}),
        ("velora_config", {"num_groups": 64}),
        ("monteclora_config", {}),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("enable_lora", [True, False, True]),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("auto_mapping", {"base_model_class": "LlamaForSequenceClassification"}),
        ("auto_mapping", ["LlamaForCausalLM"]),
        ("a_new_method", True),
        ("a_new_method", False),
        ("a_new\nmethod", {}),
        ("r", 4.0),
        ("r", True),
        ("r", "4"),
        ("r", 0),
        ("r", None),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", 0),
        ("lora_dropout", None),
        ("lora_dropout", float("nan")),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("lora_dropout", False),
        ("fan_in_fan_out", "yes"),
        ("inference_mode", None),
    ],
)  # fmt: skip
def test_another_value_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    refused(write(tmp_path, **{key: value}), f"{json.dumps(key)[1:-1]}={json.dumps(value)} ")


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type"])
def test_a_key_that_is_missing(tmp_path: Path, key: str) -> None:
    (tmp_path / FILE).write_text(json.dumps({k: v for k, v in PLAIN.items() if k != key}))
    refused(tmp_path, f"{key} is missing; add it")


@pytest.mark.parametrize(
    ("keys", "held"),
    [
        ({}, "qv"),
        ({"target_modules": ["self_attn.q_proj"]}, "q"),
        ({"target_modules": [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]}, "k"),
        ({"target_modules": r".*\.layers\.\d+\..*(q|k)_proj"}, "qk"),
        # as LLaMA-Factory and unsloth write them
        ({"target_modules": r"^(?!.*visual).*(?:v_proj|q_proj).*"}, "qv"),
        (
            {
                "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp|ffn).*?(?:q_proj|k_proj).*?)|"
                r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
            },
            "qk",
        ),
        ({"target_modules": "all-linear"}, "qkv"),
        ({"target_modules": "all-linear", "exclude_modules": ["k_proj"]}, "qv"),
        ({"target_modules": ["q_proj", "lm_head"], "exclude_modules": ".*lm_head"}, "q"),
    ],
)
def test_targets_are_pefts(tmp_path: Path, keys: dict[str, Any], held: str) -> None:
    settings = read_settings(write(tmp_path, **keys))
    chosen = [module for module in MODULES if module[-6] in held]
    require_targets(settings, chosen, MODULES)
    with pytest.raises(ValueError, match=r"target_modules=.* names model\.layers\.0.* whose factors are missing"):
        require_targets(settings, chosen[1:], MODULES)
    if len(chosen) < len(MODULES):
        with pytest.raises(ValueError, match=r"target_modules=.* does not name .*, whose factors the file has"):
            require_targets(settings, MODULES, MODULES)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": None}, "target_modules=null is neither a string nor a list of strings"),
        ({"target_modules": [1]}, "target_modules=[1] is neither"),
        ({"target_modules": "(q"}, 'target_modules="(q" is not a regular expression'),
        *(
            ({"target_modules": pattern}, "repeats a repetition, which may take forever")
            for pattern in (
                "(.+)+x",
                "(a|b|.)*x",
                "((.*)y?)*x",
                "(?:(?:.|..)+)+",
                "(.+x?){2,9}",
                "(?=(.+)+x).*",
                ".*" * 30,
            )
        ),
        ({"exclude_modules": {"q": 1}}, 'exclude_modules={"q": 1} is neither'),
    ],
)
def test_targets_that_are_none(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        require_targets(read_settings(write(tmp_path, **keys)), MODULES, MODULES)
