"""A manifest that is damaged or does not match its files is refused, naming file and tensor."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TENSORS, bits, write_tensors

from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.manifest import Damaged, check_files, digest

pytestmark = pytest.mark.usefixtures("any_tensors")


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
    folder = write_tensors(tmp_path / "w")
    damage(folder)
    with pytest.raises(Damaged, match=message) as error:
        read_manifest(folder)
    assert str(error.value).startswith(f"{folder}/manifest.json: ")
    assert "\n" not in str(error.value)


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
    folder = write_tensors(tmp_path / "w")
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
    folder = write_tensors(tmp_path / "w", {"weight.a": torch.zeros(4), "weight.b": torch.ones(4)})
    raw = data_file(folder).read_bytes()
    data_file(folder).write_bytes(raw[:-32] + raw[-16:] + raw[-32:-16])
    with pytest.raises(Damaged, match=r"tensor weight\.a .* do not match their checksum"):
        read_tensor(folder, read_manifest(folder), "weight.a")
