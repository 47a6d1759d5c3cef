"""Random config.json of every family: transformers' logits, or a refusal that names the key; never other logits."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from campaign import rounds
from safetensors.torch import save_file
from torch import Tensor

from megalite.config import Config, TrainConfig, check, resolve
from megalite.exchange.hf_folder import open_config, open_folder
from megalite.exchange.hf_weights import placeholder, read_whole
from megalite.model.context import Context
from megalite.model.decoder import Decoder
from megalite.model.init import materialise
from megalite.parallel.groups import Group

TOKENS = torch.randint(61, (2, 48), generator=torch.Generator().manual_seed(0))
ROPES: list[Any] = [
    None,
    {},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_theta": 50000},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 3, "rope_theta": 777.0},
    {"rope_type": "linear", "factor": 0.5},
    {"rope_type": "linear", "factor": "2"},
    {"rope_type": "linear"},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2, "beta_fast": 8, "beta_slow": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.4, "original_max_position_embeddings": 8},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 1.0, "beta_fast": 0, "beta_slow": None},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 2.0},
    {"rope_type": None, "type": "linear", "factor": 2.0},
    {"rope_type": "default", "type": "linear", "factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "linear",
]  # fmt: skip
COMMON: dict[str, list[Any]] = {
    "vocab_size": [61, 64, 0, None],
    "tie_word_embeddings": [True, False],
    "initializer_range": [0.3, 0, -1.0],
    "is_causal": [True, False],
    "quantization_config": [None, {"bits": 4}],
    "auto_map": [None, {"AutoModel": "m.M"}],
    "architectures": [None, [], ["LlamaModel"]],
    "dtype": ["float32", "bfloat16"],
    "torch_dtype": ["float16"],
    "use_cache": [True, False],
    "pad_token_id": [None, 0],
    "output_attentions": [False],
    "per_layer_config": [None, {"0": {"sliding_window": 4}}],
    "attn_logit_softcapping": [None, 20.0],
    "an_unknown_key": [1, {"a": []}],
}
ROTARY: dict[str, list[Any]] = {
    **COMMON,
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "rope_theta": [100.0, 1000000, 0, None, "x"],
    "original_max_position_embeddings": [12, None],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "num_key_value_heads": [1, 2, 4, 3, None, ..., 0],
    "num_attention_heads": [4, 8, 3, 0, True],
    "num_hidden_layers": [1, 3, 0, 2.0],
    "head_dim": [8, 12, 7, None, ..., 0],
    "hidden_size": [24, 40, 30, "32"],
    "intermediate_size": [20, 1, 0],
    "hidden_act": ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", None],
    "rms_norm_eps": [1e-3, 1, 0, None, float("nan")],
    "attention_dropout": [0.1, 0, None, 1.0],
    "attention_bias": [True, False, None],
    "mlp_bias": [True, False],
    "sliding_window": [5, 17, 100, 1, 0, -3, None, 2.0],
    "use_sliding_window": [True, True, False],
    "max_window_layers": [0, 1, 2, 50, -1, None],
    "layer_types": [None, ["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"],
                    ["full_attention"], ["chunked_attention"] * 2, "full_attention"],
    "max_position_embeddings": [64, 32, None, 0],
}  # fmt: skip
ABSOLUTE: dict[str, list[Any]] = {
    **COMMON,
    "n_embd": [24, 30, 0],
    "n_head": [2, 3, 0, 5],
    "n_layer": [1, 3],
    "n_inner": [None, 40, 0],
    "n_positions": [64, 48, 20],
    "activation_function": ["gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu"],
    "layer_norm_epsilon": [1e-3, 0, None],
    "resid_pdrop": [0.2, 0.1, None],
    "scale_attn_weights": [True, False, None],
    "scale_attn_by_inverse_layer_idx": [False, True],
    "reorder_and_upcast_attn": [False, True],
    "add_cross_attention": [False, True],
    "hidden_size": [32, 24],
    "num_hidden_layers": [2, 3],
    "sliding_window": [5],
}
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "llama": (SMALL, ROTARY),
    "mistral": (SMALL, ROTARY),
    "qwen2": (SMALL, ROTARY),
    "qwen3": (SMALL | {"head_dim": 8}, ROTARY),
    "gpt2": ({"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, ABSOLUTE),
}


def some_config(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    family = draw.choice(sorted(FAMILIES))
    config, variations = copy.deepcopy(FAMILIES[family])
    for key in draw.sample(sorted(variations), draw.randint(1, 4)):
        value = copy.deepcopy(draw.choice(variations[key]))
        config.pop(key, None)
        config |= {} if value is ... else {key: value}
    return {"model_type": family, **config}


def their_logits(folder: Path, seed: int) -> Tensor | None:
    """transformers' logits of random weights, which are left in `folder`; None where it refuses the configuration."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                middle = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
                parameter.copy_(middle + 0.25 * torch.randn(parameter.shape, generator=generator))
            tied = config.tie_word_embeddings
            kept = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
            save_file(
                {key: value.clone() for key, value in kept.items()}, folder / "model.safetensors", {"format": "pt"}
            )
            logits: Tensor = model.eval()(TOKENS, use_cache=False).logits
    except Exception:  # whatever it raises of a configuration that it cannot run
        return None
    return logits if bool(logits.isfinite().all()) else None


@torch.inference_mode()
def our_logits(folder: Path) -> Tensor:
    opened = open_folder(folder)
    config = Config(model=opened.model, train=TrainConfig(seq_len=min(TOKENS.shape[1], opened.context)))
    check(resolve(config, 1), 1)
    with torch.device("meta"):
        decoder = Decoder(opened.model, range(opened.model.num_layers), kernel="torch")
    materialise(decoder, opened.model, Group([0], 0), placeholder, dtype=torch.float32, device=torch.device("cpu"))
    for name, parameter in decoder.named_parameters():
        parameter.copy_(read_whole(opened, name))
    logits: Tensor = decoder.eval()(TOKENS, Context(torch.arange(TOKENS.shape[1]).expand(len(TOKENS), -1)))
    return logits


def our_answer(folder: Path, weights: bool) -> Tensor | str | None:
    """Logits, or None where there are no weights to run; or the message of a refusal."""
    try:
        if weights:
            return our_logits(folder)
        open_config(folder)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
def test_every_config_is_equal_or_refused(tmp_path: Path) -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    counts = {"equal": 0, "refused by name": 0, "refused by both": 0, "opened here alone": 0}
    number = rounds(80, 400)
    for seed in range(number):
        config = some_config(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        theirs = their_logits(folder, seed)
        ours = our_answer(folder, theirs is not None)
        if isinstance(ours, str):
            assert "\n" not in ours, config
            assert "=" in ours or " is missing; add it" in ours, (config, ours)
            counts["refused by name" if theirs is not None else "refused by both"] += 1
            continue
        if theirs is None or ours is None:
            counts["opened here alone"] += 1  # where a float has to have a point, or a key must not be null
            continue
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        assert difference <= 1e-5, (seed, config, difference)
        counts["equal"] += 1
    print(f"{number} configurations: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    assert counts["equal"] >= number // 4
