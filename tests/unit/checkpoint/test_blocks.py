"""A checkpoint gives back what was written, bit for bit, or says which file and tensor it cannot give."""

import contextlib
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megalite.checkpoint import blocks as blocks_module
from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.manifest import Damaged, check_files, digest
from megalite.checkpoint.save import write_whole
from megalite.config import Config
from megalite.parallel.cuts import Block, split

pytestmark = pytest.mark.usefixtures("any_tensors")

TENSORS = {
    "weight.embed.weight": torch.arange(600, dtype=torch.float32).view(20, 30),
    "weight.wide": torch.arange(100, dtype=torch.float64).view(2, 50),
    "weight.norm.weight": torch.arange(7).bfloat16(),
    "exp_avg.norm.weight": torch.tensor([math.nan, math.inf, -0.0, 1e-40]),
    "weight.half": torch.arange(9).half().view(3, 3),
}
STATE = {"step": 3, "consumed_samples": 24, "best_loss": math.nan}


def write(folder: Path, tensors: dict[str, Tensor] = TENSORS) -> Path:
    described = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    return write_whole(folder, Config(), described, tensors.__getitem__, STATE)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 200 bytes and files of 1000, so that rows, columns and files are all cut."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 200)
    monkeypatch.setattr(blocks_module, "FILE_BYTES", 1000)


def bits(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_tensors_come_back_bit_for_bit(tmp_path: Path, small_blocks: None) -> None:
    folder = write(tmp_path / "step-00000003")
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
    folder = write(tmp_path / "whole")
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
    with pytest.raises(ValueError, match=r"tensor weight\.a is .*float64.* not .*float32"):
        write_whole(
            tmp_path / "w", Config(), {"weight.a": (torch.float32, (2,))}, lambda _: torch.zeros(2).double(), STATE
        )
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"weight\.a: int64 is not supported; use float32, bfloat16"):
        write_whole(tmp_path / "w", Config(), {"weight.a": (torch.int64, (2,))}, lambda _: torch.zeros(2), STATE)
    folder = write(tmp_path / "w")
    with pytest.raises(ValueError, match="exists; name a new folder"):
        write(folder)


def edit(change: Callable[[dict[str, Any]], object], sign: bool = True) -> Callable[[Path], None]:
    """A change of the manifest; `sign`: by someone who also corrects its digest."""

    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        if sign:
            manifest["digest"] = digest(manifest)
        path.write_text(json.dumps(manifest))

    return damage


def embed(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return manifest["tensors"]["weight.embed.weight"]["blocks"]


def rename_file(manifest: dict[str, Any], name: str) -> None:
    for tensor in manifest["tensors"].values():
        for block in tensor["blocks"]:
            block["file"] = name
    manifest["files"] = {name: manifest["files"].popitem()[1]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(lambda m: m.update(step=4), sign=False), "it was changed after it was written"),
        (edit(lambda m: m["config"]["optim"].update(lr=1.0), sign=False), "it was changed after it was written"),
        (edit(lambda m: m.update(step=-1)), "step is -1, not a count"),
        (edit(lambda m: embed(m).pop()), "0 of 600 elements are stored"),
        (
            edit(lambda m: embed(m).append(embed(m)[0])),
            r"the elements from \[0, 0\] are stored twice",
        ),
        (edit(lambda m: embed(m)[0].update(size=[19, 30])), "570 of 600 elements"),
        (edit(lambda m: embed(m)[0].update(start=[1, 0])), r"from \[1, 0\] to \[21, 30\] is outside \[20, 30\]"),
        (edit(lambda m: embed(m)[0].update(start=[-1, 0])), "a block has no start or size"),
        (edit(lambda m: embed(m)[0].update(file="other")), "other is not in the list of files"),
        (edit(lambda m: rename_file(m, "../rank")), "'../rank' is not a file name"),
        (edit(lambda m: rename_file(m, "/etc/passwd")), "'/etc/passwd' is not a file name"),
        (edit(lambda m: rename_file(m, ".hidden")), "'.hidden' is not a file name"),
        (edit(lambda m: m["tensors"]["weight.half"].update(dtype="float8")), "no known dtype"),
        (edit(lambda m: m.pop("files")), "files or tensors are missing"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "it is not a JSON object"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{"), "not a manifest"),
        (lambda folder: os.truncate(folder / "manifest.json", 500), "not a manifest"),
        (lambda folder: (folder / "manifest.json").unlink(), "No such file"),
    ],
)
def test_a_manifest_that_cannot_be_believed_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = write(tmp_path / "w")
    damage(folder)
    with pytest.raises(Damaged, match=message) as error:
        read_manifest(folder)
    assert str(error.value).startswith(f"{folder}/manifest.json: ")
    assert "\n" not in str(error.value)


def test_another_format_is_not_damage(tmp_path: Path) -> None:
    folder = write(tmp_path / "w")
    (folder / "manifest.json").write_text('{"format": 2, "step": 3}')
    with pytest.raises(
        ValueError, match="has format 2, this megalite reads format 3; use the version that wrote it"
    ) as e:
        read_manifest(folder)
    assert not isinstance(e.value, Damaged)


def data_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def flip(folder: Path, at: int) -> None:
    """One bit of the file's only data file, counted from its beginning or end."""
    raw = bytearray(data_file(folder).read_bytes())
    raw[at] ^= 1
    data_file(folder).write_bytes(raw)


def link(folder: Path) -> None:
    outside = folder.with_name("outside")
    shutil.move(data_file(folder), outside)
    (folder / "rank-00000-000.safetensors").symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "seen_without_reading"),
    [
        (lambda folder: flip(folder, -1), False),  # the last byte of the last tensor
        (lambda folder: flip(folder, 0), True),  # the length of the header
        (lambda folder: flip(folder, 20), True),  # in the header
        (lambda folder: os.truncate(data_file(folder), 900), True),
        (lambda folder: data_file(folder).write_bytes(data_file(folder).read_bytes() + b"x"), True),
        (lambda folder: data_file(folder).unlink(), True),
        (link, True),
        (lambda folder: data_file(folder).write_bytes(os.urandom(data_file(folder).stat().st_size)), True),
    ],
)
def test_a_damaged_file_is_named_with_its_tensor(
    tmp_path: Path, damage: Callable[[Path], None], seen_without_reading: bool
) -> None:
    folder = write(tmp_path / "w")
    manifest = read_manifest(folder)
    file = data_file(folder)
    damage(folder)
    failures = []
    for name in TENSORS:
        with contextlib.suppress(Damaged):
            assert bits(read_tensor(folder, manifest, name)) == bits(TENSORS[name])
            continue
        failures.append(name)
        with pytest.raises(Damaged) as error:
            read_tensor(folder, manifest, name)
        assert str(error.value).startswith(f"{file}: tensor {name} cannot be read (")
        assert "\n" not in str(error.value)
    assert failures
    if seen_without_reading:
        with pytest.raises(Damaged, match=r"tensor \S+ cannot be read"):
            check_files(folder, manifest)
    else:
        check_files(folder, manifest)
        assert bits(read_tensor(folder, manifest, failures[0], verify=False)) != bits(TENSORS[failures[0]])


def test_two_blocks_that_change_places_are_noticed(tmp_path: Path) -> None:
    """Same shape, same sizes: only the checksums know."""
    folder = write(tmp_path / "w", {"weight.a": torch.zeros(4), "weight.b": torch.ones(4)})
    raw = data_file(folder).read_bytes()
    data_file(folder).write_bytes(raw[:-32] + raw[-16:] + raw[-32:-16])
    with pytest.raises(Damaged, match=r"tensor weight\.a .* do not match their checksum"):
        read_tensor(folder, read_manifest(folder), "weight.a")
