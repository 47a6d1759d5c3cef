"""A run on four real ranks that begins with a Hugging Face folder and ends with one."""

from pathlib import Path

import pytest
import torch
from conftest import Settings
from ranks import pretrain, refused, run_ranks, whole_tensors
from safetensors.torch import load_file, save_file

from megalite.checkpoint.folder import complete
from megalite.exchange.convert import from_hf_folder
from megalite.exchange.hf_fields import read_json
from megalite.exchange.hf_folder import open_folder
from megalite.exchange.hf_verify import verify
from megalite.exchange.hf_weights import read_whole

transformers = pytest.importorskip("transformers")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The model of `settings`, as transformers writes it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, vocab_size=257, max_position_embeddings=64, rms_norm_eps=1e-5)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_from_a_folder_to_a_folder(settings: Settings, source: Path, tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    ways = ("parallel.tp=2", "parallel.pp=2", f"model.from_hf={source}", f"train.export_hf={out}", "train.steps=2")
    argv = settings(run_dir, *ways)
    ended = run_ranks(4, pretrain, argv)
    assert f"loaded {source}" in ended.out[0]
    assert f"exported {out}" in ended.out[0]
    # what was trained is what stands there, and transformers computes the same from it
    saved, folder = whole_tensors(complete(run_dir)[-1]), open_folder(out)
    weights = {name: tensor for name, tensor in saved.items() if name.startswith("weight.")}
    assert all(torch.equal(read_whole(folder, name.removeprefix("weight.")), weights[name]) for name in weights)
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {key: (new[key] - old[key]).abs().max().item() for key in old}
    # two steps of lr 1e-3 on the weights of the folder, not on fresh ones
    assert 0 < max(changed.values()) < 5e-3
    assert verify(out, run_dir).equal
    assert read_json(out / "config.json")["max_position_embeddings"] == 64

    # a converted folder is a run folder to start from, and what came beside its weights goes with them
    again = settings(tmp_path / "again", f"checkpoint.load={from_hf_folder(out, tmp_path / 'converted')}")
    ended = run_ranks(
        2, pretrain, [*again, "model.num_kv_heads=4", "checkpoint.load_optim=false", "parallel.dp=2", "train.steps=1"]
    )
    assert "weights only" in ended.out[0]
    assert (tmp_path / "again" / "hf" / "config.json").read_bytes() == (out / "config.json").read_bytes()

    # the same command goes on from the run's own checkpoint, not from the folder: that one need not have its weights
    (source / "model.safetensors").unlink()
    more = [word for word in argv if not word.startswith(("train.steps", "train.export_hf"))] + ["train.steps=3"]
    ended = run_ranks(4, pretrain, more)
    assert "at step 2" in ended.out[0]
    assert len(complete(run_dir)) == 2


def test_mistakes_are_told_before_training(settings: Settings, source: Path, tmp_path: Path) -> None:
    def told(message: str, *words: str) -> None:
        refused(settings(tmp_path / "run", *words), message)
        assert not (tmp_path / "run").exists()

    told("model.hidden_size=32, but", f"model.from_hf={wider(source, tmp_path / 'wider')}")
    told("no such folder; name one that holds config.json", f"model.from_hf={tmp_path / 'none'}")
    told("both name the weights to start from", f"model.from_hf={source}", f"checkpoint.load={source}")
    told("is not empty; nothing is overwritten", f"train.export_hf={source}")
    told("model.norm=layernorm: the nearest", f"train.export_hf={tmp_path / 'new'}", "model.norm=layernorm")
    told("is train.run_dir; name another", f"train.export_hf={tmp_path / 'run'}")
    whole = load_file(source / "model.safetensors")
    whole.pop("model.norm.weight")
    save_file(whole, source / "model.safetensors")
    told("tensor model.norm.weight is missing", f"model.from_hf={source}")


def wider(source: Path, folder: Path) -> Path:
    """The same config.json but for the width."""
    folder.mkdir()
    text = (source / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": 48'), encoding="utf-8")
    return folder
