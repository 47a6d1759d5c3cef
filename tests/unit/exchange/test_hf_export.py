"""Hugging Face folders as they are written."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from folders import Make, change
from safetensors.torch import load_file

from megalite.config import ModelConfig, resolve_model
from megalite.exchange.convert import from_hf_folder, to_hf_folder
from megalite.exchange.hf_export import INDEX, differing


def test_carried_files_of_another_model_are_refused(folder_of: Make, tmp_path: Path) -> None:
    run = from_hf_folder(folder_of("Llama"), tmp_path / "run")
    change(run / "hf", "config.json", rms_norm_eps=0.1)
    with pytest.raises(ValueError, match=r"config.json: model.norm_eps is 0.1 there and 1e-05 in the checkpoint"):
        to_hf_folder(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_hold_whole_parameters_and_an_index(folder_of: Make, tmp_path: Path) -> None:
    run = from_hf_folder(folder_of("Llama"), tmp_path / "run")
    out = to_hf_folder(run, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((out / INDEX).read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) > 2
    stored = {key: file.name for file in files for key in load_file(file)}
    assert index["weight_map"] == stored
    whole = load_file(folder_of("Llama") / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    # q, k and v are one parameter here
    for layer in range(4):
        assert len({stored[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv"}) == 1
    assert all(torch.equal(x, whole[key]) for file in files for key, x in load_file(file).items())


def test_models_differ_in_what_is_computed() -> None:
    model = resolve_model(ModelConfig(), 64)
    assert differing(model, dataclasses.replace(model, init_std=0.5, dropout=0.1, from_hf="x")) == []
    assert differing(model, dataclasses.replace(model, norm_eps=0.5)) == ["norm_eps"]
