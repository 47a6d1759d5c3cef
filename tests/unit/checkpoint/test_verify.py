"""Verification finds every damage, and names it."""

import os
from pathlib import Path

import pytest
from checkpoints import flip, tensors, tool, write, write_two

from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.manifest import Removed
from megalite.checkpoint.retain import remove
from megalite.checkpoint.verify import verify

pytestmark = pytest.mark.usefixtures("any_tensors")


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
