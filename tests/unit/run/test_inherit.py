"""What a run takes over from the weights that it starts from, unless the user sets it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from assets import asset

from megalite.config import ConfigError, Request, from_mapping, parse_command_line, resolve
from megalite.config.read import read_yaml_file
from megalite.config.schema import TuneConfig
from megalite.exchange.hf_folder import find_tokenizer
from megalite.run.command import understand
from megalite.run.inherit import inherit_tokenizer

ROOT = Path(__file__).parents[3]


def asked(*argv: str, tuning: bool = True) -> Request:
    return understand(argv, "sft-7b" if tuning else "llama2-7b", tuning, print)


def test_one_command(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, context, tokenizer and template are the run's; how to tune is the preset's."""
    for load in (run, f"{run}/checkpoints/step-00000007"):
        config = asked(f"checkpoint.load={load}", "data.sft=chats.jsonl").config
        assert config.model == resolve(from_mapping(read_yaml_file(Path(run, "config.yaml"))), 1).model
        assert (config.data.tokenizer, config.data.template) == (f"{run}/tokenizer.model", "plain")
        assert (config.train.seq_len, config.train.epochs, config.train.run_dir) == (64, 3, "runs/sft-7b")
        assert (config.optim.lr, config.checkpoint.load_optim) == (2e-5, False)
        said = capsys.readouterr().out.splitlines()
        assert said == [
            f"model of {load}: 3 layers of 8, 32000 tokens",
            f"train.seq_len=64: {load} was trained with sequences of that length",
            f"data.tokenizer={run}/tokenizer.model",
            f"data.template=plain: {run}/tokenizer.model has no chat template of its own",
        ]
    Path(run, "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert asked(f"checkpoint.load={run}", "data.sft=chats.jsonl").config.data.template is None  # it lies beside


def test_what_the_user_sets_wins(run: str) -> None:
    words = [f"checkpoint.load={run}", "data.sft=chats.jsonl"]
    mine = asked(*words, "train.seq_len=96", "model.dropout=0.5", "checkpoint.load_optim=true", "train.run_dir=here")
    config = mine.config
    assert (config.train.seq_len, config.model.dropout, config.checkpoint.load_optim) == (96, 0.5, True)
    assert config.train.run_dir == "here"
    config = asked(*words, "data.tokenizer=mine.model", "data.template=llama2").config
    assert (config.data.tokenizer, config.data.template) == ("mine.model", "llama2")
    assert asked(*words, "model.num_layers=3").config.model.num_layers == 3
    message = f"^model.num_layers=4, but {run} has 3; leave model.num_layers to checkpoint.load$"
    with pytest.raises(ConfigError, match=message):
        asked(*words, "model.num_layers=4")
    # a preset that names a model is a wish too; the check of the checkpoint tells of the difference
    assert asked("--preset", "tiny", *words).config.model.hidden_size == 128


def test_from_a_lora_run(make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(make_run(Path("runs/lora"), tune=TuneConfig(mode="lora", lora_rank=3, lora_targets="q_proj")))
    tune = asked(f"checkpoint.load={folder}", "data.sft=chats.jsonl").config.tune
    assert (tune.mode, tune.lora_rank, tune.lora_alpha, tune.lora_targets) == ("lora", 3, 32.0, "q_proj")
    tune = asked(
        "--preset", "sft-7b-lora", f"checkpoint.load={folder}", "data.sft=c.jsonl", "tune.lora_rank=5"
    ).config.tune
    assert (tune.lora_rank, tune.lora_dropout) == (5, 0.05)
    assert asked(f"checkpoint.load={folder}", "data.sft=c.jsonl", "tune.mode=full").config.tune.mode == "full"


def test_from_a_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = asset("smollm2")
    for key in ("checkpoint.load", "model.from_hf"):
        config = asked(f"{key}={model}", "data.sft=chats.jsonl").config
        assert (config.model.from_hf, config.checkpoint.load) == (str(model), None)
        assert (config.data.tokenizer, config.data.template) == (str(find_tokenizer(model)), None)
        assert config.model.hidden_size == 576


def test_a_run_goes_on_when_its_source_is_gone(run: str, make_run: Callable[..., Path]) -> None:
    make_run(Path("runs/sft-7b"))
    Path(run).rename("runs/moved")
    config = asked(f"checkpoint.load={run}", "data.sft=chats.jsonl").config
    assert (config.model.num_layers, config.data.tokenizer) == (3, "runs/sft-7b/tokenizer.model")
    with pytest.raises(ValueError, match="runs/mine: no such folder"):
        asked(f"checkpoint.load={run}", "data.sft=chats.jsonl", "train.run_dir=new")


def test_a_run_lends_its_tokenizer_and_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "pretrained"
    (run_dir / "checkpoints" / "step-00000003").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000003" / "manifest.json").touch()

    def tokenizer(*argv: str) -> str | None:
        words = ["data.sft=chats.jsonl", f"checkpoint.load={run_dir}", *argv]
        return inherit_tokenizer(
            parse_command_line(words, default_preset="sft-7b", prog="test"), print
        ).config.data.tokenizer

    assert tokenizer() is None
    (run_dir / "tokenizer.model").touch()
    assert tokenizer("data.tokenizer=mine.json") == "mine.json"
    assert capsys.readouterr().out == ""
    assert tokenizer() == str(run_dir / "tokenizer.model")
    assert capsys.readouterr().out == f"data.tokenizer={run_dir}/tokenizer.model\n"
    (run_dir / "chat_template.jinja").touch()
    told = f"data.tokenizer={run_dir}/tokenizer.model, data.template={run_dir}/chat_template.jinja\n"
    assert tokenizer(f"checkpoint.load={run_dir}/checkpoints/step-00000003") == str(run_dir / "tokenizer.model")
    assert capsys.readouterr().out == told
    assert tokenizer("data.template=plain") == str(run_dir / "tokenizer.model")
    assert "data.template" not in capsys.readouterr().out
