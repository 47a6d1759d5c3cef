"""What a run keeps in its folder beside checkpoints and metrics."""

import dataclasses
import os
from pathlib import Path

import pytest
from assets import asset

from megalite.config import Config, ConfigError, DataConfig, TrainConfig, to_yaml
from megalite.run.run_folder import ask_requeue, fill_run_folder, holds_files, make_run_folder, remake_run_folder


def test_another_configuration_is_kept(tmp_path: Path) -> None:
    first, second = Config(), Config(train=TrainConfig(steps=7))
    for step, config in ((0, first), (0, first), (5, second)):
        fill_run_folder(tmp_path, config, None, step)
    assert (tmp_path / "config.yaml").read_text() == to_yaml(second)
    assert (tmp_path / "config.before-step-00000005.yaml").read_text() == to_yaml(first)
    assert len(list(tmp_path.glob("config*"))) == 2


def test_tokenizer_and_template_belong_to_the_run(tmp_path: Path) -> None:
    source = asset("smollm2")
    config = Config(data=DataConfig(tokenizer=str(source)))
    stale = tmp_path / "additional_chat_templates"
    stale.mkdir()
    (stale / "tool.jinja").write_text("of another template")
    fill_run_folder(tmp_path, config, "{{ messages }}", 0)
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not stale.exists()
    # the tokenizer of the folder itself is not copied onto itself
    own = dataclasses.replace(config, data=DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    fill_run_folder(tmp_path, own, None, 0)
    assert (tmp_path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_folder_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    remake_run_folder(tmp_path / "run", Config(), None, 3)
    assert (tmp_path / "run" / "config.yaml").read_text() == to_yaml(Config())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^it cannot be made again: (File exists|Not a directory) \(.*file"):
        remake_run_folder(tmp_path / "file" / "run", Config(), None, 3)


def test_a_folder_is_tried_before_the_ranks_start(tmp_path: Path) -> None:
    make_run_folder(tmp_path / "a" / "run")
    assert not holds_files(tmp_path / "a" / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^train.run_dir=.*/file/run cannot be written \(Not a directory\)\. "):
        make_run_folder(tmp_path / "file" / "run")
    for name in ("LOCK", ".LOCK-1", ".writable-1"):
        (tmp_path / "a" / "run" / name).touch()
    assert not holds_files(tmp_path / "a" / "run")
    (tmp_path / "a" / "run" / "thesis.tex").touch()
    assert holds_files(tmp_path / "a" / "run")


def test_a_stopped_run_asks_to_be_queued_again(tmp_path: Path) -> None:
    ask_requeue(tmp_path, 12, "time limit")
    lines = (tmp_path / "REQUEUE").read_text().splitlines()
    assert lines[:2] == ["step 12", "reason time limit"]
    assert lines[2].startswith("time 2")
    assert os.listdir(tmp_path) == ["REQUEUE"]
