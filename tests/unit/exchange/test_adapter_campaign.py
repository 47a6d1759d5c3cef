"""Random adapters of peft: the logits that peft finds, or a refusal that names the key; never other logits."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import rounds
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.exchange.adapter import import_peft
from megalite.exchange.merge import open_merged
from megalite.model.context import Context
from megalite.model.decoder import Decoder
from megalite.model.init import materialise
from megalite.parallel.groups import Group

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SMALL,
    "Mistral": SMALL | {"sliding_window": 9},
    "Qwen2": SMALL | {"tie_word_embeddings": True},
    "Qwen3": SMALL | {"head_dim": 8},
    "GPT2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_LINEARS = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj", "c_proj"]
# what LoraConfig is made with; often nothing of it, so that plain adapters are among them
OPTIONS: dict[str, list[Any]] = {
    "r": [1, 2, 4, 6],
    "lora_alpha": [1, 8, 16, 3],
    "lora_dropout": [0.0, 0.1],
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "mica"],
    "bias": ["none", "all", "lora_only"],
    "use_rslora": [False, True],
    "use_dora": [False, True],
    "fan_in_fan_out": [False, True],
    "rank_pattern": [{}, {"q_proj": 3}, {"c_attn": 3}],
    "alpha_pattern": [{}, {"v_proj": 2}, {"c_fc": 2}],
    "layers_to_transform": [None, [0], [0, 1], 1],
    "exclude_modules": [None, ["v_proj"], r".*\.1\..*", ["lm_head"]],
    "modules_to_save": [None, ["lm_head"]],
    "trainable_token_indices": [None, [3, 4]],
    "alora_invocation_tokens": [None, [int(TOKENS[0, 9])]],
    "layer_replication": [None, [[0, 2], [0, 1]]],
    "task_type": ["CAUSAL_LM", None],
    "ensure_weight_tying": [False, True],
}
# what another hand may have written into the files
EDITS: dict[str, list[Any]] = {
    "r": [4.0, None, 8, True],
    "lora_alpha": [7, 2.5, None, "8", float("nan"), 0],
    "lora_dropout": [None, 0, float("nan"), 0.5],
    "use_rslora": [True, None],
    "target_modules": [["q_proj"], LINEARS, ".*_proj", "all-linear", None, "(", [3], ["lm_head"], [r"c_attn"]],
    "exclude_modules": [["q_proj"], ".*k_proj", []],
    "layers_to_transform": [[0], []],
    "alpha_pattern": [{"q_proj": 64}, None],
    "init_lora_weights": ["pissa", "olora", None, "loftq", "eva"],
    "an_unknown_key": [None, True, "x"],
    "peft_type": ["ADALORA", None],
    "fan_in_fan_out": [True, False],
    "enable_lora": [None],
    "modules_to_save": [[], None],
    "peft_version": ["99.0"],
}


def write_base(folder: Path, family: str) -> None:
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(1)
    settings = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **FAMILIES[family]}
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and key.endswith("weight") else 0.0, 0.2)
    model.save_pretrained(folder)


def base_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def write_adapter(draw: random.Random, family: str, base: Path, folder: Path) -> dict[str, Any] | None:
    """A random adapter; gives what was drawn, or None where peft cannot make it."""
    linears = GPT2_LINEARS if family == "GPT2" else LINEARS
    targets = draw.sample(linears, draw.randint(1, len(linears)))
    options = {key: draw.choice(OPTIONS[key]) for key in draw.sample(sorted(OPTIONS), draw.randint(0, 3))}
    try:
        model = peft.get_peft_model(base_model(base), peft.LoraConfig(target_modules=targets, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name or (parameter.requires_grad and "bias" in name):
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    except Exception:  # combinations that peft has not
        return None
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    edits = {key: draw.choice(EDITS[key]) for key in draw.sample(sorted(EDITS), draw.choice((0, 0, 1, 2)))}
    file.write_text(json.dumps(settings | edits))
    weights = folder / "adapter_model.safetensors"
    if draw.random() < 0.1:
        tensors = load_file(weights)
        tensors.pop(draw.choice(sorted(tensors)))
        save_file(tensors, weights)
        edits["a tensor"] = "missing"
    return {"targets": targets, **options, "then": edits}


@torch.no_grad()
def their_logits(base: Path, adapter: Path) -> Tensor | None:
    """The logits of the adapter as peft opens it; None where it does not, or finds other factors than it looks for."""
    try:
        torch.manual_seed(2)
        model = peft.PeftModel.from_pretrained(base_model(base), adapter).eval()
        logits: Tensor = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False).logits
    except Exception:  # whatever it raises of a folder that it cannot open
        return None
    return logits if bool(logits.isfinite().all()) else None


@torch.inference_mode()
def our_answer(base: Path, adapter: Path, run: Path) -> Tensor | str:
    """The logits of the imported adapter, merged; or the message of a refusal."""
    try:
        config, get, _ = open_merged(import_peft(adapter, base, run))
    except ValueError as error:
        return str(error)
    model = config.model
    with torch.device("meta"):
        decoder = Decoder(model, range(model.num_layers), kernel="torch")
    zeros = torch.zeros(())
    shape_only = lambda name, shape: zeros.expand(shape)  # noqa: E731
    materialise(decoder, model, Group([0], 0), shape_only, dtype=torch.float32, device=torch.device("cpu"))
    for name, parameter in decoder.named_parameters():
        parameter.copy_(get(name))
    logits: Tensor = decoder.eval()(TOKENS, Context(torch.arange(TOKENS.shape[1]).expand(len(TOKENS), -1)))
    return logits


@pytest.mark.filterwarnings("ignore")
def test_every_adapter_is_equal_or_refused(tmp_path: Path) -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    for family in FAMILIES:
        write_base(tmp_path / family, family)
    counts = {"equal": 0, "refused by name": 0, "refused by both": 0, "opened here alone": 0}
    number = rounds(25, 300)
    for seed in range(number):
        draw = random.Random(seed)
        family = draw.choice(sorted(FAMILIES))
        base, adapter = tmp_path / family, tmp_path / f"adapter-{seed}"
        torch.manual_seed(seed)
        drawn = write_adapter(draw, family, base, adapter)
        if drawn is None:
            counts["refused by both"] += 1
            continue
        theirs, ours = their_logits(base, adapter), our_answer(base, adapter, tmp_path / f"run-{seed}")
        if isinstance(ours, str):
            assert "\n" not in ours, drawn
            assert "=" in ours or "tensor base_model." in ours or "has no factor" in ours, (drawn, ours)
            counts["refused by name" if theirs is not None else "refused by both"] += 1
        elif theirs is None:
            counts["opened here alone"] += 1
            print("opened here alone:", family, drawn)
        else:
            difference = float((ours - theirs).abs().max() / theirs.abs().max())
            assert difference <= 1e-5, (seed, family, drawn, difference)
            counts["equal"] += 1
    print(f"{number} adapters: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    assert counts["equal"] >= number // 5
