"""Which checkpoint a run continues from, and what is refused before torch has loaded."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.checkpoint.folder import complete
from megalite.checkpoint.manifest import Damaged
from megalite.config import Config, ConfigError, from_mapping, parse_command_line, resolve
from megalite.config.read import read_yaml_file
from megalite.run.resume import changed_keys, newest_readable, resume_from, take_run_folder
from megalite.run.run_folder import PROBE


def changed(config: Config, **keys: object) -> Config:
    """`train__steps=9` sets train.steps."""
    for key, value in keys.items():
        section, name = key.split("__")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


@pytest.fixture
def config(run: str) -> Config:
    """The configuration of the run in the folder `run`, which is at step 7."""
    return resolve(from_mapping(read_yaml_file(Path(run, "config.yaml"))), 1)


def test_the_newest_checkpoint_is_continued_and_changes_are_said(config: Config, run: str) -> None:
    said: list[str] = []
    (newest,) = complete(Path(run))
    assert resume_from(config, said.append) == newest
    assert said == []
    assert resume_from(changed(config, train__steps=9, optim__lr=1e-5), said.append) == newest
    assert said == [
        "changed since the last run: optim.lr: 0.0003 -> 1e-05",
        "changed since the last run: train.steps: 7 -> 9",
    ]
    Path(run, "config.yaml").write_text(" \n")
    resume_from(config, said.append)
    assert said[2:] == [f"note: {run}/config.yaml is empty; it will be rewritten"]


def test_a_key_that_an_older_version_left_open_has_not_changed(config: Config, run: str) -> None:
    saved = Path(run, "config.yaml")
    saved.write_text(saved.read_text().replace("  num_kv_heads: 2\n", ""))
    assert changed_keys(saved, config) == []


def test_never_and_must(config: Config, run: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.run_dir={run} is not empty and checkpoint.resume=never; choose"):
        resume_from(changed(config, checkpoint__resume="never"), print)
    elsewhere = changed(config, train__run_dir="runs/new")
    with pytest.raises(ConfigError, match=r"^checkpoint.resume=must, but runs/new has no finished checkpoint$"):
        resume_from(changed(elsewhere, checkpoint__resume="must"), print)
    assert resume_from(elsewhere, print) is None


def test_a_run_that_starts_from_a_checkpoint_has_steps_left(config: Config, run: str) -> None:
    start = changed(config, train__run_dir="runs/new", checkpoint__load=run)
    with pytest.raises(
        ConfigError, match=r"step-00000007 is at step 7 and train.steps=7: no step is left; raise train.st"
    ):
        resume_from(start, print)
    for enough in ({"train__steps": 8}, {"checkpoint__load_optim": False}, {"train__eval_only": True}):
        assert resume_from(changed(start, **enough), print) is None


def test_another_model_is_refused(config: Config, run: str) -> None:
    other = changed(config, model__dropout=0.5, model__num_layers=4)
    for start in (other, changed(other, train__run_dir="runs/new", checkpoint__load=run)):
        with pytest.raises(ValueError, match=r"holds another model: model.num_layers is 3 there and 4 here"):
            resume_from(start, print)
    with pytest.raises(ConfigError, match=rf"was trained with model.add_tokens=\[\]; .* with checkpoint.load={run}$"):
        resume_from(changed(config, model__add_tokens=("<|x|>",)), print)


def test_damaged_checkpoints_are_passed_over(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (old,) = complete(folder)
    new = old.with_name("step-00000009")
    new.mkdir()
    (new / "manifest.json").write_text("{")
    said: list[str] = []
    assert newest_readable(folder, said.append) == old
    assert [line.partition(" manifest")[0] for line in said] == [f"note: {new}/manifest.json: not a"]
    (old / "manifest.json").write_text("{")
    with pytest.raises(Damaged, match=r"step-00000009/.*; .*step-00000007/"):
        newest_readable(folder, said.append)


def test_a_run_that_saved_meanwhile_is_noticed(config: Config, run: str) -> None:
    with pytest.raises(ConfigError, match=f"train.run_dir={run}: another run has saved there while this one started"):
        take_run_folder(config, None)
    assert not Path(run, "LOCK").exists()
    take_run_folder(config, complete(Path(run))[-1])
    assert Path(run, "LOCK").exists()


def test_the_probe_of_another_rank_is_no_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / PROBE).touch()
    words = [f"train.run_dir={tmp_path / 'run'}"]
    config = parse_command_line(words, default_preset="tiny", prog="test").config
    assert resume_from(config, print) is None
    (tmp_path / "run" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        resume_from(config, print)
