"""A folder appears when it is complete, and one process writes it."""

import os
from pathlib import Path

import pytest
from checkpoints import tool, write

from megalite.checkpoint.folder import BUILDING
from megalite.checkpoint.lock import hold, release
from megalite.checkpoint.publish import new_folder, remove_leftovers

pytestmark = pytest.mark.usefixtures("any_tensors")


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


def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with new_folder(target) as building:
        (building / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "new") as building:
            (building / "file").write_text("x")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / f"{BUILDING}new" / "sub").mkdir(parents=True)
    (tmp_path / f"{BUILDING}new" / "sub" / "old").write_text("x")
    with new_folder(tmp_path / "new"):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_leftovers_of_a_run_are_removed(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder.parent / f"{BUILDING}step-00000002").mkdir()
    (folder.parent / f"{BUILDING}latest").write_text("x")
    remove_leftovers(tmp_path)
    assert list(folder.parent.iterdir()) == [folder]
