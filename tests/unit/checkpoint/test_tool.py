"""tools/checkpoint.py on checkpoints of two ranks and of one process: info, verify, diff and prune."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import step_state, steps, tool, write, write_two

from megalite.checkpoint.folder import step_folder
from megalite.checkpoint.save import write_whole
from megalite.checkpoint.state import State
from megalite.config import Config, ModelConfig, resolve

pytestmark = pytest.mark.usefixtures("any_tensors")

ROOT = Path(__file__).parents[3]


def test_info(tmp_path: Path) -> None:
    write(tmp_path, 2)
    folder = write_two(tmp_path, 5)
    text = tool("info", tmp_path, "--tensors", "ght.a")
    assert text.startswith(f"{folder}\n  step       5, 40 samples consumed\n")
    assert "weight     2 tensors, 128 elements, 512 bytes, float32" in text
    assert "2 checkpoints: step-00000002, step-00000005" in text
    assert text.endswith("  weight.a  [16, 4]  float32  2 blocks\n")
    what = json.loads(tool("info", folder, "--json"))
    assert what["state"] == step_state(5)
    assert what["kinds"]["exp_avg"] == {"tensors": 2, "elements": 128, "bytes": 512, "dtypes": ["float32"]}
    assert what["files"] == {f.name: f.stat().st_size for f in folder.glob("*.safetensors")}
    assert "--tensors alone lists all" in tool("info", folder, "--tensors", "nothing", status=2)
    assert "no such folder" in tool("info", tmp_path / "nowhere", status=2)


def test_info_and_verify_do_not_load_torch(tmp_path: Path) -> None:
    config = resolve(Config(model=ModelConfig(5, 4, num_layers=1, num_heads=1, ffn_hidden_size=4)), 1)
    described = {f"weight.{name}": (torch.float32, shape) for name, shape in config.shapes.model.items()}
    counters = dataclasses.asdict(State())
    write_whole(step_folder(tmp_path, 0), config, described, lambda name: torch.ones(described[name][1]), counters)
    for verb in ("info", "verify"):
        code = f"""import sys; sys.argv = ["checkpoint.py", "{verb}", {str(tmp_path)!r}]
from tools.checkpoint import main; assert main() == 0; assert "torch" not in sys.modules"""
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True)


def test_the_same_at_two_topologies_is_equal(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 3), write_two(tmp_path / "b", 3)
    assert "equal: all 4 tensors, bit for bit" in tool("diff", a, b)
    assert "equal: all 2 tensors" in tool("diff", a, b, "--kinds", "weight")
    assert "use exp_avg, weight" in tool("diff", a, b, "--kinds", "master", status=2)


def test_prune(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    text = tool("prune", tmp_path, "--keep", 1, "--keep-every", 20, "--dry-run")
    assert text.count("would remove") == 2
    assert steps(tmp_path) == [10, 20, 30, 40]
    text = tool("prune", tmp_path, "--keep", 1, "--keep-every", 20)
    assert text.startswith(f"verified {step_folder(tmp_path, 40)}\nremoved {step_folder(tmp_path, 10)}: ")
    assert text.splitlines()[-1].startswith("2 of 4 checkpoints removed, ")
    assert steps(tmp_path) == [20, 40]
    assert "0 of 2 checkpoints removed" in tool("prune", tmp_path, "--keep", 5)
    assert "must be at least 1" in tool("prune", tmp_path, "--keep", 0, status=2)
    assert "is not a run folder with checkpoints" in tool("prune", tmp_path / "no", "--keep", 1, status=2)


@pytest.mark.parametrize(("words", "says"), [([], "required: VERB"), (["prune", "x"], "--keep"), (["inof"], "invalid")])
def test_a_mistake_in_the_command_is_one_line(words: list[str], says: str) -> None:
    command = [sys.executable, "tools/checkpoint.py", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert says in run.stderr
    assert run.stderr.count("\n") == 1
