"""LoRA beside peft's, another implementation, on the same Hugging Face model: twenty steps of loss, and its files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_runs import ALPHA, FAMILIES, LR, RANK, STEPS, folder, make_config, ours, peft, theirs
from parity import batches
from torch.nn import functional as F

from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.config import ModelConfig, to_yaml
from megalite.exchange.adapter import export_peft, import_peft, merge_adapter
from megalite.exchange.base import base_of
from megalite.exchange.convert import to_hf_folder
from megalite.model.init import draw


def peft_losses(source: Path, modules: list[str], model_config: ModelConfig) -> list[float]:
    model = theirs(source).train()
    fused = model_config.position == "learned"
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=modules, fan_in_fan_out=fused)
    model = peft.get_peft_model(model, settings)
    names = {
        "q_proj": "attn.qkv.lora_q",
        "k_proj": "attn.qkv.lora_k",
        "v_proj": "attn.qkv.lora_v",
        "o_proj": "attn.out.lora_o",
    }
    names |= {"gate_proj": "mlp.gate_up.lora_gate", "up_proj": "mlp.gate_up.lora_up", "down_proj": "mlp.down.lora_down"}
    names |= {"attn.c_attn": "attn.qkv.lora_qkv", "attn.c_proj": "attn.out.lora_o"}
    names |= {"mlp.c_fc": "mlp.up.lora_up", "mlp.c_proj": "mlp.down.lora_down"}
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parts = name.split(".")
            layer = next(part for part in parts if part.isdigit())
            module = next(m for there, m in names.items() if f".{there}.lora_A" in name)
            parameter.data.copy_(draw(f"layers.{layer}.{module}.a", tuple(parameter.shape), model_config, 7))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = tokens = torch.zeros(())
        for mb in batches(False):
            logits = model(mb.tokens, use_cache=False).logits
            ce = F.cross_entropy(logits.flatten(0, 1), mb.labels.flatten(), reduction="none")
            loss, tokens = loss + (ce * mb.loss_mask.flatten()).sum(), tokens + mb.loss_mask.sum()
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append((loss / tokens).item())
    return found


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2-pp2-sp": {"tp": 2, "pp": 2, "sp": True},
    "tp4": {"tp": 4},
    "dp2-zero": {"dp": 2, "zero": 1},
}
TARGETS = {"Llama": "", "Qwen2": "q_proj v_proj", "GPT2": ""}
MODULES = {
    "Llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "Qwen2": ["q_proj", "v_proj"],
    "GPT2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_curves_are_pefts(family: str, root: Path, tmp_path: Path) -> None:
    source = folder(family, root)
    weights = {key: p.detach() for key, p in theirs(source).named_parameters()}
    config = make_config(source, tmp_path, {}, {"lora_targets": TARGETS[family]})
    expected = peft_losses(source, MODULES[family], config.model)
    assert expected[-1] < expected[0] - 0.1
    for name in LAYOUTS if family == "Llama" else ("tp2-pp2-sp",):
        layout = LAYOUTS[name]
        found = ours(make_config(source, tmp_path, layout, {"lora_targets": TARGETS[family]}), weights)
        worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
        print(f"{family} {name}: losses deviate by {worst:.1e}")
        assert worst <= 1e-5


@pytest.mark.parametrize("targets", ["", "layers.1.*", "q_proj down_proj"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_an_adapter_goes_to_peft_and_back(family: str, targets: str, root: Path, tmp_path: Path) -> None:
    if family == "GPT2" and "q_proj" in targets:
        targets = "attn.qkv mlp.down"
    source, run_dir = folder(family, root), tmp_path / "run"
    weights = {key: p.detach() for key, p in theirs(source).named_parameters()}
    config = make_config(source, run_dir, {"tp": 2, "pp": 2, "sp": True}, {"lora_targets": targets})
    ours(config, weights, run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    tokens = batches(False)[0].tokens

    export_peft(run_dir, tmp_path / "peft", str(source))
    with torch.no_grad():
        plain = theirs(source).eval()(tokens).logits
        adapted = theirs(source, tmp_path / "peft").eval()(tokens).logits
        # merged by us into a Hugging Face folder
        inside = theirs(to_hf_folder(run_dir, tmp_path / "merged-hf")).eval()(tokens).logits
        # merged by us into a run folder, and out again
        again = (
            theirs(to_hf_folder(merge_adapter(run_dir, tmp_path / "merged"), tmp_path / "again")).eval()(tokens).logits
        )
    scale = plain.abs().max()
    assert (adapted - plain).abs().max() > 1e-3 * scale
    assert (inside - adapted).abs().max() <= 1e-5 * scale
    assert torch.equal(again, inside)

    if targets == "layers.1.*":
        with pytest.raises(ValueError, match="is missing, though another layer has it; every layer needs"):
            import_peft(tmp_path / "peft", source, tmp_path / "back")
        return
    back, step = import_peft(tmp_path / "peft", source, tmp_path / "back"), run_dir / "checkpoints" / "step-00000020"
    assert base_of(back) == base_of(step) == source
    old, new = read_manifest(step), read_manifest(back)
    assert {name for name in old["tensors"] if name.startswith("weight.")} == new["tensors"].keys()
    for name in new["tensors"]:
        assert torch.equal(read_tensor(back, new, name), read_tensor(step, old, name)), name
