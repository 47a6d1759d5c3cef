"""tools/checkpoint.py on checkpoints of two ranks and of one process: every verb but convert."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint import compare as compare_module
from megalite.checkpoint.compare import compare, differing_values
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import BUILDING, read_manifest, step_folder
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.lock import hold, release
from megalite.checkpoint.manifest import Removed
from megalite.checkpoint.publish import publish, write_rank
from megalite.checkpoint.retain import remove, surplus
from megalite.checkpoint.save import own_parts, write_whole
from megalite.checkpoint.state import State
from megalite.checkpoint.verify import verify
from megalite.config import Config, ModelConfig, from_mapping, resolve
from megalite.config.read import read_yaml_file
from megalite.parallel.cuts import even
from tools.checkpoint import main

pytestmark = pytest.mark.usefixtures("any_tensors")

ROOT = Path(__file__).parents[3]


def tensors(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{kind}.{n}": torch.randn(16, 4, generator=generator) for kind in ("weight", "exp_avg") for n in "ab"}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "consumed_samples": 8 * step, "data": "corpus: 9 tokens"}


def write(run: Path, step: int, values: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint of one process."""
    values = values or tensors()
    described = {name: (x.dtype, tuple(x.shape)) for name, x in values.items()}
    return write_whole(step_folder(run, step), Config(), described, values.__getitem__, state(step))


def write_two(run: Path, step: int) -> Path:
    """The same of two ranks, each with half of the rows."""
    final, values = step_folder(run, step), tensors()
    building = final.with_name(BUILDING + final.name)
    for rank in range(2):
        shards = {n: even((16, 4), 0, 2, rank) for n in "ab"}
        kinds = {kind: {n: shards[n].cut(values[f"{kind}.{n}"]) for n in "ab"} for kind in ("weight", "exp_avg")}
        owned = list(own_parts(shards, {n: range(32) for n in "ab"}, kinds))
        write_rank(building, rank, [p for p, _ in owned], (v for _, v in owned), Faults(rank, ""))
    publish(building, final, Config(), state(step), Faults(0, ""))
    return final


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def tool(*words: object, status: int = 0) -> str:
    """What the command prints, errors too; fails unless it ends with `status`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main([str(word) for word in words])
    assert found == status, out.getvalue() + err.getvalue()
    assert (status == 2) == err.getvalue().startswith("error: ")
    assert err.getvalue().count("\n") == (status == 2)
    return out.getvalue() + err.getvalue()


def test_info(tmp_path: Path) -> None:
    write(tmp_path, 2)
    folder = write_two(tmp_path, 5)
    text = tool("info", tmp_path, "--tensors", "ght.a")
    assert text.startswith(f"{folder}\n  step       5, 40 samples consumed\n")
    assert "weight     2 tensors, 128 elements, 512 bytes, float32" in text
    assert "2 checkpoints: step-00000002, step-00000005" in text
    assert text.endswith("  weight.a  [16, 4]  float32  2 blocks\n")
    what = json.loads(tool("info", folder, "--json"))
    assert what["state"] == state(5)
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


def test_verify_names_all_that_is_damaged(tmp_path: Path) -> None:
    good, bad = write_two(tmp_path, 1), write_two(tmp_path, 2)
    assert tool("verify", good).startswith(f"good  {good}: 4 tensors in 8 blocks, 1.02 kB read in ")
    first, second = sorted(bad.glob("*.safetensors"))
    flip(first, -1)  # the last block of rank 0: exp_avg.b
    flip(first, first.stat().st_size - 4 * 128)  # its first: weight.a
    second.unlink()
    (bad / "unknown").write_text("not of the checkpoint")
    lines = tool("verify", tmp_path, status=1).splitlines()
    assert lines[0].startswith("good  ")
    assert lines[1].startswith(f"damaged  {first}: tensor weight.a cannot be read (the elements from [0, 0] do not")
    assert lines[2].startswith(f"damaged  {first}: tensor exp_avg.b cannot be read (the elements from [0, 0] do not")
    assert [line.partition(" cannot")[0] for line in lines[3:7]] == [
        f"damaged  {second}: tensor {name}" for name in tensors()
    ]
    assert lines[7].startswith(f"6 damages  {bad}: ")
    os.truncate(good / "manifest.json", 100)
    assert tool("verify", good, status=1).startswith(f"damaged  {good}/manifest.json: not a manifest")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Whichever byte of a file changes, headers too, except in what only fills the header up."""
    folder = write(tmp_path, 1)
    manifest = read_manifest(folder)
    (path,) = folder.glob("*.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    data = range(8 + length, len(raw))
    for at in [*range(8), *data[::7]]:
        path.unlink()
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        assert verify(folder, manifest, threads=1).damages, at


def test_the_same_at_two_topologies_is_equal(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 3), write_two(tmp_path / "b", 3)
    assert "equal: all 4 tensors, bit for bit" in tool("diff", a, b)
    assert "equal: all 2 tensors" in tool("diff", a, b, "--kinds", "weight")
    assert "use exp_avg, weight" in tool("diff", a, b, "--kinds", "master", status=2)


def test_diff_measures(tmp_path: Path) -> None:
    values = tensors()
    values["weight.a"][3, 2] += 0.5
    values["exp_avg.c"] = values.pop("exp_avg.b")
    a, b = write(tmp_path / "a", 3), write(tmp_path / "b", 4, values)
    largest = values["weight.a"].abs().max()
    lines = tool("diff", a, b, status=1).splitlines()
    assert "state    step: 3 in a, 4 in b" in lines
    moved = abs(float(values["weight.a"][3, 2]) - float(tensors()["weight.a"][3, 2]))
    assert f"tensor   weight.a: max|a-b| {moved:.3e}, relative {moved / largest:.3e}, 1 of 64 elements" in lines
    assert lines[-3:] == ["tensor   exp_avg.b: only in a", "tensor   exp_avg.c: only in b", "3 of 5 tensors differ"]
    flip(next(b.glob("*.safetensors")), -1 - 256)
    assert (
        "do not match their checksum" in tool("diff", a, b, status=2).splitlines()[-1]
    )  # of what cannot be read nothing is said


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1.0, torch.nan, torch.inf], [1.0, torch.nan, torch.inf], None),
        ([1.0, torch.nan, 2.0], [1.0, torch.nan, 4.0], (1, 2.0, 0.5)),
        ([0.0, torch.inf], [-0.0, torch.inf], (1, 0.0, 0.0)),  # one bit
        ([1.0, 2.0], [0.0, 0.0], (2, 2.0, torch.inf)),
        ([1.0] * 5, [1.0] * 4 + [3.0], (1, 2.0, 2 / 3)),  # in the last chunk
    ],
)
def test_differences_are_of_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, x: list[float], y: list[float], said: tuple[float, ...] | None
) -> None:
    monkeypatch.setattr(compare_module, "CHUNK", 2)
    a, b = (write(tmp_path / n, 1, {"weight.x": torch.tensor(v)}) for n, v in (("a", x), ("b", y)))
    ((_, found),) = compare((a, read_manifest(a)), (b, read_manifest(b)))
    assert (found and (found.elements, found.largest, found.relative)) == (said and pytest.approx(said))


def test_a_number_beside_a_nan_is_a_difference_of_nan(tmp_path: Path) -> None:
    a, b = (write(tmp_path / str(v), 1, {"weight.x": torch.tensor([v, 1.0])}) for v in (torch.nan, 1.0))
    ((_, found),) = compare((a, read_manifest(a)), (b, read_manifest(b)))
    assert found
    assert "max|a-b| nan, relative nan, 1 of 2 elements" in str(found)


def test_other_shapes_and_dtypes_are_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 1, {"weight.x": torch.ones(4), "weight.y": torch.tensor([1.0, 1 / 3])})
    b = write(tmp_path / "b", 1, {"weight.x": torch.ones(5), "weight.y": torch.tensor([1.0, 1 / 3]).bfloat16()})
    x, y = (str(d) for _, d in compare((a, read_manifest(a)), (b, read_manifest(b))))
    assert x == "weight.x: shape [4] in a, [5] in b"
    assert y.startswith("weight.y: float32 in a, bfloat16 in b; max|a-b| 6.510e-04, relative 6.510e-04, 1 of 2 elem")


def test_differing_values() -> None:
    a = {"same": 1, "model": {"x": 1, "y": [1], "nan": float("nan")}, "gone": 0}
    b = {"same": 1, "model": {"x": 2, "y": [1], "nan": float("nan")}, "new": {"z": 1}}
    assert list(differing_values(a, b)) == [("model.x", 1, 2), ("gone", 0, None), ("new", None, {"z": 1})]


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
    assert {key: manifest[key] for key in state(7)} == state(7)
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


def names(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_prune(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    text = tool("prune", tmp_path, "--keep", 1, "--keep-every", 20, "--dry-run")
    assert text.count("would remove") == 2
    assert names(tmp_path) == [10, 20, 30, 40]
    text = tool("prune", tmp_path, "--keep", 1, "--keep-every", 20)
    assert text.startswith(f"verified {step_folder(tmp_path, 40)}\nremoved {step_folder(tmp_path, 10)}: ")
    assert text.splitlines()[-1].startswith("2 of 4 checkpoints removed, ")
    assert names(tmp_path) == [20, 40]
    assert "0 of 2 checkpoints removed" in tool("prune", tmp_path, "--keep", 5)
    assert "must be at least 1" in tool("prune", tmp_path, "--keep", 0, status=2)
    assert "is not a run folder with checkpoints" in tool("prune", tmp_path / "no", "--keep", 1, status=2)


def test_nothing_goes_while_the_newest_is_damaged(tmp_path: Path) -> None:
    write(tmp_path, 1)
    flip(next(write(tmp_path, 2).glob("*.safetensors")), -1)
    assert "tensor exp_avg.b cannot be read" in tool("prune", tmp_path, "--keep", 1, status=2)
    assert names(tmp_path) == [1, 2]


def test_a_checkpoint_that_is_pruned_under_its_reader_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = write(tmp_path, 1), write(tmp_path, 2)
    manifest = read_manifest(older)
    remove(older)
    remove(older)  # someone else was faster
    says = rf"{older} was removed while it was being read: its run keeps the newest checkpoints only"
    for read in (lambda: read_tensor(older, manifest, "weight.a"), lambda: verify(older, manifest)):
        with pytest.raises(Removed, match=says):
            read()
    with pytest.raises(Removed, match=says):
        read_manifest(older)
    # of a run's checkpoints one goes after they were listed
    monkeypatch.setattr("tools.checkpoint.complete", lambda run: [older, newer])
    lines = tool("verify", tmp_path).splitlines()
    assert lines[0].startswith(f"removed  {older} was removed while")
    assert lines[1].startswith(f"good  {newer}: ")


def test_two_processes_do_not_write_one_new_folder(tmp_path: Path) -> None:
    """A folder that is being written is not cleared by a second process; what a dead one left is."""
    write(tmp_path / "run", 1)
    building = tmp_path / ".building-new"
    (building / "checkpoints").mkdir(parents=True)
    hold(building)
    assert "is in use by" in tool("consolidate", tmp_path / "run", tmp_path / "new", status=2)
    assert sorted(os.listdir(building)) == ["LOCK", "checkpoints"]
    release(building)
    tool("consolidate", tmp_path / "run", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "run"]
    assert sorted(os.listdir(tmp_path / "new")) == ["checkpoints", "config.yaml"]


def test_a_link_to_a_checkpoint_never_goes(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3)]
    away = folders[0].rename(tmp_path / "away")
    folders[0].symlink_to(away)
    assert surplus(folders, 1) == [folders[1]]
    assert surplus(folders, 0) == []
    assert surplus(folders, 9) == []


@pytest.mark.parametrize(("words", "says"), [([], "required: VERB"), (["prune", "x"], "--keep"), (["inof"], "invalid")])
def test_a_mistake_in_the_command_is_one_line(words: list[str], says: str) -> None:
    command = [sys.executable, "tools/checkpoint.py", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert says in run.stderr
    assert run.stderr.count("\n") == 1
