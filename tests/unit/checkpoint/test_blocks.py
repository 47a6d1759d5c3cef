"""A checkpoint gives back what was written, bit for bit, or says which file and tensor it cannot give."""

import math
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STATE, TENSORS, bits, write_tensors
from safetensors.torch import load_file
from torch import Tensor

from megalite.checkpoint import blocks as blocks_module
from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.manifest import check_files
from megalite.checkpoint.save import write_whole
from megalite.config import Config
from megalite.parallel.cuts import Block, split

pytestmark = pytest.mark.usefixtures("any_tensors")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 200 bytes and files of 1000, so that rows, columns and files are all cut."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 200)
    monkeypatch.setattr(blocks_module, "FILE_BYTES", 1000)


def test_tensors_come_back_bit_for_bit(tmp_path: Path, small_blocks: None) -> None:
    folder = write_tensors(tmp_path / "step-00000003")
    manifest = read_manifest(folder)
    assert (manifest["step"], manifest["consumed_samples"]) == (3, 24)
    assert len(manifest["files"]) > 3
    for name, x in TENSORS.items():
        again = read_tensor(folder, manifest, name)
        assert (again.dtype, again.shape, bits(again)) == (x.dtype, x.shape, bits(x))
        width = x.element_size()
        assert all(math.prod(b["size"]) * width <= 200 for b in manifest["tensors"][name]["blocks"])
    # rows of 400 bytes are cut by columns
    assert [b["start"] for b in manifest["tensors"]["weight.wide"]["blocks"]] == [[0, 0], [0, 25], [1, 0], [1, 25]]
    assert all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    check_files(folder, manifest)
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    folder = write_tensors(tmp_path / "whole")
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    assert {key.partition("[")[0]: bits(x) for key, x in stored.items()} == {n: bits(x) for n, x in TENSORS.items()}


def test_memory_is_one_tensor_and_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thirty tensors never more than one is alive when the next is asked for."""
    alive: list[Any] = []

    def get(name: str) -> Tensor:
        assert all(ref() is None for ref in alive)
        x = torch.zeros(1000, 10)
        alive.append(weakref.ref(x))
        return x

    names = {f"weight.{i}": (torch.float32, (1000, 10)) for i in range(30)}
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 4000)
    write_whole(tmp_path / "w", Config(), names, get, STATE)
    assert len(alive) == 30


@pytest.mark.parametrize(
    ("size", "most"), [((5,), 2), ((5,), 9), ((4, 6), 6), ((4, 6), 12), ((4, 6), 4), ((4, 6), 1), ((2, 3, 4), 5)]
)
def test_a_split_covers_its_block_once(size: tuple[int, ...], most: int) -> None:
    start, offset = tuple(range(10, 10 + len(size))), tuple(range(len(size)))
    seen = torch.zeros(size)
    for part in split(Block(start, offset, size, owned=False), most):
        assert math.prod(part.size) <= most
        assert not part.owned
        moved = [a - b for a, b in zip(part.start, start)]
        assert moved == [a - b for a, b in zip(part.offset, offset)]
        seen[tuple(slice(a, a + n) for a, n in zip(moved, part.size))] += 1
    assert seen.eq(1).all()


def test_a_tensor_that_is_not_as_announced_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor weight\.a is .*float64.* expected .*float32"):
        write_whole(
            tmp_path / "w", Config(), {"weight.a": (torch.float32, (2,))}, lambda _: torch.zeros(2).double(), STATE
        )
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"weight\.a: int64 is not supported; use float32, bfloat16"):
        write_whole(tmp_path / "w", Config(), {"weight.a": (torch.int64, (2,))}, lambda _: torch.zeros(2), STATE)
    folder = write_tensors(tmp_path / "w")
    with pytest.raises(ValueError, match="exists; name a new folder"):
        write_tensors(folder)
