"""From a command line to a complete request: the command line wins over the file, the file over the preset."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.config import ConfigError, Request, parse_command_line
from megalite.config.schema import DataConfig
from megalite.run.command import own_run_folder, steps_or_epochs, understand


def asked(*argv: str, tuning: bool = True) -> Request:
    return understand(argv, "sft-7b" if tuning else "llama2-7b", tuning, print)


def test_the_run_s_own_configuration(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = asked("--config", f"{run}/config.yaml", "data.sft=chats.jsonl", "train.epochs=2").config
    assert (config.data.path, config.data.sft, config.data.valid) == (None, "chats.jsonl", {})
    assert (config.checkpoint.load, config.checkpoint.load_optim) == (run, False)
    assert (config.train.run_dir, config.train.epochs) == ("runs/sft-mine", 2)
    assert config.optim.decay_samples is None
    assert config.data.tokenizer == f"{run}/tokenizer.model"
    said = capsys.readouterr().out
    for line in (
        f"data.path=data/old of {run}/config.yaml is ignored: data.sft is set",
        f"data.valid of {run}/config.yaml is ignored",
        f"checkpoint.load={run}: the run of --config",
        f"train.run_dir=runs/sft-mine: {run} keeps its own run",
        f"train.steps=7 of {run}/config.yaml is ignored: train.epochs is set",
        f"optim.decay_samples=28 of {run}/config.yaml is ignored: it was the length of that run",
    ):
        assert line in said
    words = ["data.valid.de=de.jsonl", "train.run_dir=x", "data.path=null", "train.steps=null", "train.epochs=2"]
    config = asked("--config", f"{run}/config.yaml", "data.sft=chats.jsonl", *words).config
    assert (config.data.valid, config.train.run_dir) == ({"en": "data/en", "de": "de.jsonl"}, "x")


def test_the_configuration_without_other_data_goes_on(run: str) -> None:
    config = asked("--config", f"{run}/config.yaml", "train.steps=9", tuning=False).config
    assert (config.train.run_dir, config.train.steps, config.checkpoint.load) == (run, 9, None)
    assert config.data.path == "data/old"


def test_a_decay_beside_a_ramp_is_kept_if_it_is_not_the_length_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file written by hand leaves dp open."""
    monkeypatch.chdir(tmp_path)
    ramp = "micro_batch_size: 1, global_batch_size: 4, ramp_start: 1, ramp_samples: 10, steps: 9"
    for decay, kept in ((7, 7), (19, None)):
        Path("mine.yaml").write_text(f"train: {{{ramp}}}\noptim: {{decay_samples: {decay}}}\n")
        assert asked("--config", "mine.yaml", "train.steps=20", tuning=False).config.optim.decay_samples == kept


def test_tuning_data_gives_way_too(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run(Path("runs/chat"), data=DataConfig(sft="chats.jsonl", valid={"x": "y.jsonl"}))
    config = asked("--config", f"{folder}/config.yaml", "data.path=text", tuning=False).config
    assert (config.data.path, config.data.sft, config.data.valid) == ("text", None, {})
    assert config.train.run_dir == "runs/pretrain-chat"


def test_print_config_prints_nothing_else(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", f"{run}/config.yaml", f"checkpoint.load={run}", "data.sft=chats.jsonl", "train.epochs=2"]
    assert asked(*words, "--print-config").config.data.tokenizer == f"{run}/tokenizer.model"
    assert capsys.readouterr().out == ""
    asked(*words)
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_both_on_the_command_line_is_a_mistake(run: str) -> None:
    with pytest.raises(ConfigError, match=r"train.steps=3 and train.epochs=2 are both set"):
        asked("train.steps=3", "train.epochs=2")
    with pytest.raises(ConfigError, match=r"train.steps=null: expected int"):
        asked("--preset", "tiny", "train.steps=null")
    assert asked("train.steps=null", "train.epochs=2").config.train.epochs == 2


def test_steps_or_epochs_and_a_folder_of_its_own() -> None:
    def asked(*argv: str) -> Request:
        return own_run_folder(steps_or_epochs(parse_command_line(argv, default_preset="sft-7b", prog="test")))

    assert asked().config.train.epochs == 3
    assert asked("train.steps=5").config.train.epochs is None
    assert asked("--preset", "tiny", "train.epochs=0.5").config.train.epochs == 0.5
    assert asked().config.train.run_dir == "runs/sft-7b"
    assert asked("--preset", "tiny").config.train.run_dir == "runs/sft-tiny"
    assert asked("--preset", "tiny", "train.run_dir=here").config.train.run_dir == "here"
