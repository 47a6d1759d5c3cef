"""Which checkpoints are removed."""

from pathlib import Path

import pytest
from checkpoints import flip, steps, tool, write

from megalite.checkpoint.folder import step_folder, step_of
from megalite.checkpoint.retain import remove, surplus

pytestmark = pytest.mark.usefixtures("any_tensors")


def test_a_link_to_a_checkpoint_never_goes(tmp_path: Path) -> None:
    folders = [write(tmp_path, step) for step in (1, 2, 3)]
    away = folders[0].rename(tmp_path / "away")
    folders[0].symlink_to(away)
    assert surplus(folders, 1) == [folders[1]]
    assert surplus(folders, 0) == []
    assert surplus(folders, 9) == []


def test_nothing_goes_while_the_newest_is_damaged(tmp_path: Path) -> None:
    write(tmp_path, 1)
    flip(next(write(tmp_path, 2).glob("*.safetensors")), -1)
    assert "tensor exp_avg.b cannot be read" in tool("prune", tmp_path, "--keep", 1, status=2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("keep", "keep_every", "removed"),
    [(1, 0, [10, 20, 30]), (2, 0, [10, 20]), (4, 0, []), (9, 0, []), (0, 0, []), (1, 20, [10, 30]), (1, 10, [])],
)
def test_the_newest_and_multiples_are_kept(tmp_path: Path, keep: int, keep_every: int, removed: list[int]) -> None:
    folders = [step_folder(tmp_path, step) for step in (10, 20, 30, 40)]
    assert [step_of(folder) for folder in surplus(folders, keep, keep_every)] == removed


def test_a_checkpoint_is_hidden_before_its_files_go(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    seen: list[bool] = []
    remove(folder, lambda: seen.append(folder.exists() or not any(folder.parent.glob(".building-pruned-*/*"))))
    assert seen == [False]
    assert steps(tmp_path) == []
    remove(folder)  # someone else was faster
