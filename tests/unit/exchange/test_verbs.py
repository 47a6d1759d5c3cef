"""The verbs merge and convert of tools/checkpoint.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import Make
from lora_runs import (
    COMMON,
    LLAMA,
    folder,
    make_config,
    ours,
    theirs,
    transformers,
)

from megalite.checkpoint.folder import find
from megalite.exchange import adapter as adapter_module
from megalite.exchange.convert import from_hf_folder
from megalite.exchange.merge import open_merged
from tools import checkpoint


def test_the_command(folder_of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    sys.path.insert(0, str(Path(__file__).parents[3]))
    from tools import checkpoint

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, words)])
        status = checkpoint.main()
        out, err = capsys.readouterr()
        return status, out + err

    source, run, back = folder_of("Llama"), tmp_path / "run", tmp_path / "back"
    status, told = call("convert", "--from", "hf", source, "--to", "megalite", run, "--verify")
    assert (status, told.splitlines()[0]) == (0, f"wrote {run}")
    assert "verified: largest difference" in told
    assert call("convert", "--from", "megalite", run, "--to", "hf", back)[0] == 0
    status, told = call("convert", "--from", "megalite", run, "--to", "megatron", tmp_path / "x")
    assert status == 2
    assert told == "error: convert from megalite to megatron is not supported; use one of hf to megalite, " \
                   "megalite to hf, megalite to peft, peft to megalite, megatron to megalite\n"  # fmt: skip
    assert call("convert", "--from", "hf", tmp_path / "none", "--to", "megalite", tmp_path / "y")[0] == 2
    # --verify that fails
    monkeypatch.setattr("megalite.exchange.hf_verify.TOLERANCE", 0.0)
    status, told = call("convert", "--from", "megalite", run, "--to", "hf", tmp_path / "z", "--verify")
    assert status == 1
    assert "DIFFERENT" in told


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
    assert "adapters whose base is missing" in call("merge", run_dir, target, status=2)
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
    assert "lora_A.weight is [4, 24], for" in told
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
