"""An adapter is used with the weights it was trained on, and no others."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from lora_runs import folder, make_config, ours, theirs

from megalite.checkpoint.folder import find, read_manifest
from megalite.exchange.adapter import export_peft
from megalite.exchange.base import base_of, find_base, fingerprint, is_hf, name_of
from megalite.exchange.convert import from_hf_folder
from megalite.exchange.merge import open_merged


def test_another_base_is_refused(root: Path, tmp_path: Path) -> None:
    source, run_dir = folder("Llama", root), tmp_path / "run"
    weights = {key: p.detach() for key, p in theirs(source).named_parameters()}
    ours(make_config(source, run_dir, {}), weights, run_dir)
    other = from_hf_folder(folder("Qwen2", root), tmp_path / "other")
    with pytest.raises(ValueError, match="holds adapters for the weights"):
        open_merged(run_dir, other)
    with pytest.raises(ValueError, match="holds whole weights"):
        export_peft(other, tmp_path / "peft")


def test_a_fingerprint_is_of_the_weights(root: Path, tmp_path: Path) -> None:
    source = folder("Llama", root)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    assert is_hf(copy)
    assert fingerprint(copy) == fingerprint(source)
    assert name_of(copy) == f"{fingerprint(source)} {copy}"
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    assert fingerprint(copy) != fingerprint(source)
    run = from_hf_folder(source, tmp_path / "run")
    assert not is_hf(run)
    assert fingerprint(find(run)) == read_manifest(find(run))["digest"][:16]


def test_the_base_of_a_run_is_what_its_adapter_names(root: Path, tmp_path: Path) -> None:
    source, run_dir = folder("Llama", root), tmp_path / "run"
    weights = {key: p.detach() for key, p in theirs(source).named_parameters()}
    config = make_config(source, run_dir, {})
    ours(config, weights, run_dir)
    assert find_base(config, None) == source
    assert find_base(config, find(run_dir)) == source
    assert base_of(find(run_dir)) == source
    # a run that starts from the adapter has the adapter's base
    loading = dataclasses.replace(config.checkpoint, load=str(run_dir))
    from_adapter = dataclasses.replace(
        config, model=dataclasses.replace(config.model, from_hf=None), checkpoint=loading
    )
    assert find_base(from_adapter, find(run_dir)) == source
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, from_hf=str(folder("Qwen2", root))))
    with pytest.raises(ValueError, match=r"set checkpoint.load or model.from_hf to the weights they were trained on"):
        find_base(other, find(run_dir))
