"""A checkpoint rewritten as a run folder of whole tensors."""

import dataclasses
import os
from pathlib import Path

import pytest
from checkpoints import flip, step_state, tensors, tool, write_two

from megalite.checkpoint.folder import read_manifest, step_folder
from megalite.checkpoint.load import read_tensor
from megalite.config import Config, from_mapping, resolve
from megalite.config.read import read_yaml_file

pytestmark = pytest.mark.usefixtures("any_tensors")


def test_consolidate(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "new"
    source = write_two(run, 7)
    (run / "tokenizer.json").write_text("{}")
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    assert "1.02 kB" not in tool("consolidate", run, target, "--weights-only")
    new = step_folder(target, 7)
    manifest = read_manifest(new)
    assert list(manifest["tensors"]) == ["weight.a", "weight.b"]
    assert all(len(entry["blocks"]) == 1 for entry in manifest["tensors"].values())
    assert all(read_tensor(new, manifest, name).equal(tensors()[name]) for name in manifest["tensors"])
    assert {key: manifest[key] for key in step_state(7)} == step_state(7)
    config = from_mapping(read_yaml_file(target / "config.yaml"))
    assert config.train.run_dir == str(target)
    assert dataclasses.asdict(config.model) == dataclasses.asdict(resolve(Config(), 1).model)
    assert (target / "tokenizer.json").exists()
    assert (target / "hf" / "config.json").exists()
    assert f"{target} exists; name a new folder" in tool("consolidate", run, target, status=2)
    tool("consolidate", source, tmp_path / "all")
    tool("diff", source, tmp_path / "all")
    flip(next(source.glob("rank-00001-*")), -1)
    before = sorted(os.listdir(tmp_path))
    assert "tensor exp_avg.b cannot be read" in tool("consolidate", run, tmp_path / "bad", status=2)
    assert sorted(os.listdir(tmp_path)) == before
