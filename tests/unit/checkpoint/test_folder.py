"""Which folders are checkpoints, which one a path means, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write, write_tensors

from megalite.checkpoint.folder import (
    after,
    before,
    building_folder,
    check_model,
    complete,
    find,
    latest,
    read_manifest,
    set_aside,
    step_folder,
    step_of,
)
from megalite.checkpoint.manifest import Damaged, Removed
from megalite.config import ModelConfig

pytestmark = pytest.mark.usefixtures("any_tensors")


def empty(run: Path, *steps: int) -> list[Path]:
    """Folders with an empty manifest, which are enough to be found."""
    folders = [step_folder(run, step) for step in steps]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    return folders


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    assert complete(tmp_path) == []
    assert latest(tmp_path) is None
    nine, hundred_million, ten = empty(tmp_path, 9, 10**8, 10)
    for name in ("step-12", "step-00000012x", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    step_folder(tmp_path, 11).mkdir()  # without a manifest
    building_folder(step_folder(tmp_path, 12)).mkdir()
    assert complete(tmp_path) == [nine, ten, hundred_million]
    assert latest(tmp_path) == hundred_million
    assert [step_of(folder) for folder in complete(tmp_path)] == [9, 10, 10**8]
    assert before(hundred_million) == [ten, nine]
    assert after(nine) == [ten, hundred_million]


def test_a_damaged_checkpoint_is_kept_under_another_name(tmp_path: Path) -> None:
    (folder,) = empty(tmp_path, 5)
    assert set_aside(folder).name == "damaged-1-step-00000005"
    (folder,) = empty(tmp_path, 5)
    assert set_aside(folder).name == "damaged-2-step-00000005"
    assert complete(tmp_path) == []


def test_a_path_means_a_checkpoint(tmp_path: Path) -> None:
    old, new = empty(tmp_path, 1, 2)
    assert find(tmp_path) == new
    assert find(str(old)) == old
    with pytest.raises(ValueError, match=r"no: no such folder; name a run folder or one of its checkpoints/step-NNNN"):
        find(tmp_path / "no")
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder with one"):
        find(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").touch()
    with pytest.raises(ValueError, match=r"is a Hugging Face folder, not a run folder; .* model.from_hf="):
        find(tmp_path / "hf")


def test_another_format_is_not_damage(tmp_path: Path) -> None:
    folder = write_tensors(tmp_path / "w")
    (folder / "manifest.json").write_text('{"format": 2, "step": 3}')
    with pytest.raises(
        ValueError, match="has format 2, this megalite reads format 3; use the version that wrote it"
    ) as e:
        read_manifest(folder)
    assert not isinstance(e.value, Damaged)


def test_a_folder_that_is_gone_is_removed_and_one_with_another_name_damaged(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    with pytest.raises(Removed):
        read_manifest(tmp_path / "gone")
    renamed = folder.rename(step_folder(tmp_path, 4))
    with pytest.raises(Damaged, match="it says step 3, its folder's name says 4"):
        read_manifest(renamed)


@pytest.mark.parametrize(
    ("changes", "grows", "message"),
    [
        ({}, False, None),
        ({"hidden_size": 32}, False, "model.hidden_size is 16 there and 32 here"),
        ({"init_std": 0.5, "dropout": 0.1, "from_hf": "/x"}, False, None),
        ({"vocab_size": 102}, False, "model.vocab_size is 101 there and 102 here"),
        ({"vocab_size": 102}, True, None),
        ({"vocab_size": 100}, True, "model.vocab_size is 101 there and 100 here"),
    ],
)
def test_a_checkpoint_of_another_model(
    tmp_path: Path, changes: dict[str, Any], grows: bool, message: str | None
) -> None:
    model = dataclasses.asdict(ModelConfig(vocab_size=101, hidden_size=16))
    manifest = {"config": {"model": model}}
    if message is None:
        check_model(manifest, model | changes, tmp_path, grows)
        return
    with pytest.raises(ValueError, match=f"{tmp_path} holds another model: {message}; use the same model"):
        check_model(manifest, model | changes, tmp_path, grows)
