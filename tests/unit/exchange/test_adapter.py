"""LoRA beside peft's, another implementation, on the same Hugging Face model: twenty steps of loss, and its files."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine_parity import BATCH, SEQ, batches
from torch import Tensor
from torch.nn import functional as F

from megalite.checkpoint.folder import find, read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.save import save
from megalite.config import (
    Config,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
    check,
    resolve,
    to_yaml,
)
from megalite.engine.engine import build
from megalite.exchange import adapter as adapter_module
from megalite.exchange.adapter import export_peft, import_peft, merge_adapter
from megalite.exchange.base import base_of, name_of
from megalite.exchange.convert import FRESH, from_hf_folder, to_hf_folder
from megalite.exchange.hf_folder import open_config
from megalite.exchange.merge import merged, open_merged
from megalite.model.init import draw
from megalite.model.layouts import from_hf
from megalite.optim.adamw import clip_scale
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads
from tools import checkpoint

STEPS, LR, RANK, ALPHA = 20, 1e-2, 4, 8.0
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
COMMON = {"vocab_size": 101, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
LLAMA = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 36,
    "max_position_embeddings": 64,
}
GPT2 = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
FAMILIES = {"Llama": LLAMA, "Qwen2": LLAMA, "GPT2": GPT2}


@functools.cache
def folder(family: str, root: Path) -> Path:
    """A Hugging Face folder with a random model of fp32 weights."""
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key or ("ln_" in key and "weight" in key) else 0.0, 0.1)
    model.save_pretrained(root / family)
    return root / family


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


def theirs(source: Path, target: Path | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, attn_implementation="sdpa", dtype=torch.float32)
    return model if target is None else peft.PeftModel.from_pretrained(model, target)


def make_config(source: Path, run_dir: Path, parallel: dict[str, Any], tune: dict[str, Any] | None = None) -> Config:
    p = {"tp": 1, "pp": 1, "dp": 1, "sp": False, "bucket_mb": 0.001} | parallel
    config = Config(
        model=dataclasses.replace(open_config(source)[0], from_hf=str(source)),
        parallel=ParallelConfig(**p),
        train=TrainConfig(seq_len=SEQ, micro_batch_size=BATCH, global_batch_size=4 * BATCH, run_dir=str(run_dir)),
        optim=OptimConfig(lr=LR, weight_decay=0.0, beta2=0.999),
        tune=TuneConfig(**{"mode": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, **(tune or {})}),
    )
    config = resolve(config, p["tp"] * p["pp"] * p["dp"])
    check(config, p["tp"] * p["pp"] * p["dp"])
    return config


def ours(
    config: Config, weights: dict[str, Tensor], save_to: Path | None = None, base: Path | None = None
) -> list[float]:
    """The mean losses of STEPS steps, each on all of `batches`; then a checkpoint."""

    def main(world: World) -> list[tuple[float, float]]:
        def value(name: str, shape: tuple[int, ...]) -> Tensor:
            return (
                draw(name, shape, config.model, 7)
                if ".lora_" in name
                else from_hf(weights.__getitem__, name, config.model)
            )

        engine = build(config, world, value)
        found = []
        dp = engine.mesh.dp
        for _ in range(STEPS):
            loss, tokens = engine.forward_backward(batches(False)[dp.rank :: dp.size]).values()
            sums = torch.tensor([loss, tokens, engine.gradient_squares()], dtype=torch.float64)
            loss, tokens, squares = engine.mesh.world.all_reduce(sums).tolist()
            engine.update(LR, clip_scale(config.optim, squares, tokens)[1])
            found.append(loss / tokens)
        if save_to is not None:
            state = FRESH | {"step": STEPS, "consumed_samples": STEPS * BATCH}
            state |= {"base": name_of(base or Path(config.model.from_hf))}
            save(save_to, config, engine.mesh, engine.shards, engine.spans(), engine.state(), state)
        return found

    p = config.parallel
    return run_threads(p.tp * p.pp * p.dp, main)[0]


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


def test_merged_is_unmerged_in_float64(root: Path, tmp_path: Path) -> None:
    source, run_dir = folder("Llama", root), tmp_path / "run"
    weights = {key: p.detach().double() for key, p in theirs(source).named_parameters()}
    config = make_config(source, run_dir, {})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="fp64"))
    ours(config, weights, run_dir)
    step = run_dir / "checkpoints" / "step-00000020"
    manifest = read_manifest(step)

    # the base is fp32 on disk; here it is as wide as it ran
    def get(name: str) -> Tensor:
        if ".lora_" in name:
            return read_tensor(step, manifest, f"weight.{name}")
        return from_hf(weights.__getitem__, name, config.model)

    plain, inside = dataclasses.replace(config, tune=TuneConfig()), merged(config, get)
    beside = build(config, SoloWorld(), lambda name, shape: get(name)).evaluate(batches(False))["loss"]
    without = build(plain, SoloWorld(), lambda name, shape: get(name)).evaluate(batches(False))["loss"]
    together = build(plain, SoloWorld(), lambda name, shape: inside(name)).evaluate(batches(False))["loss"]
    assert abs(together - beside) <= 1e-12 * beside < 1e-3 * abs(without - beside)


def test_another_base_is_refused(root: Path, tmp_path: Path) -> None:
    source, run_dir = folder("Llama", root), tmp_path / "run"
    weights = {key: p.detach() for key, p in theirs(source).named_parameters()}
    ours(make_config(source, run_dir, {}), weights, run_dir)
    other = from_hf_folder(folder("Qwen2", root), tmp_path / "other")
    with pytest.raises(ValueError, match="holds adapters to the weights"):
        open_merged(run_dir, other)
    with pytest.raises(ValueError, match="holds whole weights"):
        export_peft(other, tmp_path / "peft")


def test_the_verbs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """merge and convert of the tool; the base has moved, and what fails leaves nothing behind."""
    base, run_dir = from_hf_folder(folder("Llama", root), tmp_path / "base"), tmp_path / "run"
    (base / "chat_template.jinja").write_text("its template")
    config = make_config(folder("Llama", root), run_dir, {})
    weights = {key: p.detach() for key, p in theirs(folder("Llama", root)).named_parameters()}
    ours(config, weights, run_dir, base=find(base))
    (run_dir / "chat_template.jinja").write_text("the run's template")
    base = base.rename(tmp_path / "moved")

    def call(*words: object, status: int = 0) -> str:
        capsys.readouterr()
        assert checkpoint.main([str(word) for word in words]) == status
        out, err = capsys.readouterr()
        assert not list(tmp_path.glob(".*"))
        assert out if status == 0 else err.startswith("error: ")
        return out + err

    def convert(there: str, source: Path, here: str, target: Path, *more: object, status: int = 0) -> str:
        return call("convert", "--from", there, source, "--to", here, target, *more, status=status)

    target, adapter, back = tmp_path / "target", tmp_path / "adapter", tmp_path / "back"
    assert "their base is not there" in call("merge", run_dir, target, status=2)
    assert "holds whole weights" in call("merge", base, target, status=2)
    assert call("merge", run_dir, target, "--base", base) == f"wrote {target}\n"
    assert (target / "chat_template.jinja").read_text() == "the run's template"
    assert "nothing is overwritten" in call("merge", run_dir, target, "--base", base, status=2)

    assert convert("megalite", run_dir, "peft", adapter) == f"wrote {adapter}\n"
    assert '"base_model_name_or_path": ""' in (adapter / "adapter_config.json").read_text()
    assert "--base DIR" in convert("peft", adapter, "megalite", back, status=2)
    assert "merge the adapter first" in convert("peft", adapter, "megalite", back, "--verify", status=2)
    assert "--base x is for peft" in convert("megalite", run_dir, "hf", back, "--base", "x", status=2)
    told = convert("peft", adapter, "megalite", back, "--base", base)
    assert told == f"wrote {back / 'checkpoints' / 'step-00000000'}\n"
    assert (back / "chat_template.jinja").read_text() == "its template"
    _, one, _ = open_merged(back)
    _, other, _ = open_merged(run_dir, base)
    assert torch.equal(one("layers.1.mlp.gate_up.weight"), other("layers.1.mlp.gate_up.weight"))
    assert f"run_dir: {back}\n" in (back / "config.yaml").read_text()

    # another model's linears, files that are damaged, a disk that is full
    other_base = ("--base", wider(root / "wider"))
    told = convert("peft", adapter, "megalite", tmp_path / "x", *other_base, status=2)
    assert "lora_A.weight is [4, 24], beside" in told
    assert "is that the right base?" in told
    monkeypatch.setattr(adapter_module, "write_whole", full)
    monkeypatch.setattr(adapter_module, "save_file", full)
    assert "no space" in convert("peft", adapter, "megalite", tmp_path / "x", "--base", base, status=2)
    assert "no space" in convert("megalite", run_dir, "peft", tmp_path / "x", status=2)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "cut short" in convert("peft", adapter, "megalite", tmp_path / "x", "--base", base, status=2)
    settings = adapter / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"r": 4', '"r": null'))
    told = convert("peft", adapter, "megalite", tmp_path / "x", "--base", base, status=2)
    assert "adapter_config.json: r=null is not of type int" in told
    settings.unlink()
    assert "no such file" in convert("peft", adapter, "megalite", tmp_path / "x", "--base", base, status=2)
    assert not (tmp_path / "x").exists()


def full(*_: object, **__: object) -> None:
    raise OSError("no space left on device")


def wider(target: Path) -> Path:
    config = transformers.LlamaConfig(**COMMON, **LLAMA | {"hidden_size": 32})
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    return target
