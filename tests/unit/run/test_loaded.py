"""Tuning from one's own run in one command: what the run brings along, and which of two wishes is meant."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import asset

from megalite.checkpoint.save import write_whole
from megalite.config import Config, ConfigError, Request, resolve, to_yaml
from megalite.config.schema import DataConfig, ModelConfig, ParallelConfig, TrainConfig, TuneConfig
from megalite.config.shapes import shapes
from megalite.config.trained import adapter_shapes
from megalite.data.instructions import Options, write_indexed
from megalite.data.preprocess import preprocess
from megalite.engine.restore import State
from megalite.exchange.hf_folder import find_tokenizer
from megalite.run.entry import understand
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.tokenizer import load_tokenizer
from megalite.watch.metrics import read_metrics

ROOT = Path(__file__).parents[3]
ONE = ParallelConfig(tp=1, pp=1, sp=False)
MODEL = ModelConfig(vocab_size=32000, hidden_size=8, num_layers=3, num_heads=2, ffn_hidden_size=8, dropout=0.125)


def make_run(folder: Path, **sections: Any) -> Path:
    """A run folder of weights of 0 at its last step, 7, with its tokenizer."""
    train = TrainConfig(run_dir=str(folder), seq_len=64, steps=7, global_batch_size=4, micro_batch_size=2)
    data = DataConfig(path="data/old", valid={"en": "data/en"}, tokenizer="tokenizers/old.model")
    config = resolve(Config(**{"model": MODEL, "parallel": ONE, "train": train, "data": data, **sections}), 1)
    parameters = adapter_shapes(config) if config.tune.mode == "lora" else shapes(config.model)
    described = {f"weight.{name}": (torch.float32, shape) for name, shape in parameters.items()}
    state = State(step=7, consumed_samples=28, base="0123456789abcdef /gone")
    step = folder / "checkpoints" / "step-00000007"
    write_whole(step, config, described, lambda name: torch.zeros(described[name][1]), dataclasses.asdict(state))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "tokenizer.model").write_bytes(asset("mistral-v1/tokenizer.model").read_bytes())
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(make_run(Path("runs/mine")))


def asked(*argv: str, tuning: bool = True) -> Request:
    return understand(argv, "sft-7b" if tuning else "llama2-7b", tuning)


def test_one_command(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Model, context, tokenizer and template are the run's; how to tune is the preset's."""
    for load in (run, f"{run}/checkpoints/step-00000007"):
        config = asked(f"checkpoint.load={load}", "data.sft=chats.jsonl").config
        assert config.model == resolve(Config(model=MODEL, parallel=ONE), 1).model
        assert (config.data.tokenizer, config.data.template) == (f"{run}/tokenizer.model", "plain")
        assert (config.train.seq_len, config.train.epochs, config.train.run_dir) == (64, 3, "runs/sft-7b")
        assert (config.optim.lr, config.checkpoint.load_optim) == (2e-5, False)
        said = capsys.readouterr().out.splitlines()
        assert said == [
            f"model of {load}: 3 layers of 8, 32000 tokens",
            f"train.seq_len=64: {load} was trained on so many tokens",
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


def test_the_run_s_own_configuration(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = asked("--config", f"{run}/config.yaml", "data.sft=chats.jsonl", "train.epochs=2").config
    assert (config.data.path, config.data.sft, config.data.valid) == (None, "chats.jsonl", {})
    assert (config.checkpoint.load, config.checkpoint.load_optim) == (run, False)
    assert (config.train.run_dir, config.train.epochs) == ("runs/sft-mine", 2)
    assert config.optim.decay_samples is None
    assert config.data.tokenizer == f"{run}/tokenizer.model"
    said = capsys.readouterr().out
    for line in (
        f"data.path=data/old of {run}/config.yaml is left out: data.sft is set",
        f"data.valid of {run}/config.yaml is left out",
        f"checkpoint.load={run}: the run whose configuration was named",
        f"train.run_dir=runs/sft-mine: {run} keeps the run that it holds",
        f"train.steps=7 of {run}/config.yaml is left out: train.epochs is set",
        f"optim.decay_samples=28 of {run}/config.yaml is left out: it was the length of that run",
    ):
        assert line in said
    words = ["data.valid.de=de.jsonl", "train.run_dir=x", "data.path=null", "train.steps=null", "train.epochs=2"]
    config = asked("--config", f"{run}/config.yaml", "data.sft=chats.jsonl", *words).config
    assert (config.data.valid, config.train.run_dir) == ({"en": "data/en", "de": "de.jsonl"}, "x")


def test_the_configuration_without_other_data_goes_on(run: str) -> None:
    config = asked("--config", f"{run}/config.yaml", "train.steps=9", tuning=False).config
    assert (config.train.run_dir, config.train.steps, config.checkpoint.load) == (run, 9, None)
    assert config.data.path == "data/old"


def test_tuning_data_gives_way_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run(Path("runs/chat"), data=DataConfig(sft="chats.jsonl", valid={"x": "y.jsonl"}))
    config = asked("--config", f"{folder}/config.yaml", "data.path=text", tuning=False).config
    assert (config.data.path, config.data.sft, config.data.valid) == ("text", None, {})
    assert config.train.run_dir == "runs/pretrain-chat"


def test_both_on_the_command_line_is_a_mistake(run: str) -> None:
    with pytest.raises(ConfigError, match=r"train.steps=3 and train.epochs=2 are both set"):
        asked("train.steps=3", "train.epochs=2")
    with pytest.raises(ConfigError, match=r"train.steps=null: expected int"):
        asked("--preset", "tiny", "train.steps=null")
    assert asked("train.steps=null", "train.epochs=2").config.train.epochs == 2


def test_from_a_lora_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_run_goes_on_when_its_source_is_gone(run: str) -> None:
    make_run(Path("runs/sft-7b"))
    Path(run).rename("runs/moved")
    config = asked(f"checkpoint.load={run}", "data.sft=chats.jsonl").config
    assert (config.model.num_layers, config.data.tokenizer) == (3, "runs/sft-7b/tokenizer.model")
    with pytest.raises(ValueError, match="runs/mine: no such folder"):
        asked(f"checkpoint.load={run}", "data.sft=chats.jsonl", "train.run_dir=new")


def command(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / script, *argv], capture_output=True, text=True, timeout=240, env=env, check=False
    )


def test_from_data_to_an_answer_without_naming_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretrain, tune, generate and export: the tokenizer follows from the sidecar of the data."""
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("\n\n".join(f"the {i}th line of a small text" for i in range(99)))
    Path("tok.model").write_bytes(asset("mistral-v1/tokenizer.model").read_bytes())
    preprocess(["t.txt"], "data/t", load_tokenizer("tok.model"), append_eod=True)
    shape = ["model.vocab_size=32000", "model.hidden_size=8", "model.num_layers=1", "model.ffn_hidden_size=8"]
    small = [
        "train.device=cpu",
        "train.seq_len=32",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "log.plot=false",
    ]
    words = [
        "--preset",
        "tiny",
        "data.path=data/t_text_document",
        "train.steps=2",
        "train.run_dir=runs/mine",
        *shape,
        *small,
    ]
    ended = command("examples/pretrain_7b.py", *words)
    assert ended.returncode == 0, ended.stderr
    assert f"data.tokenizer={tmp_path / 'tok.model'}: data/t_text_document was made with it" in ended.stdout
    assert Path("runs/mine/tokenizer.model").read_bytes() == Path("tok.model").read_bytes()
    Path("chats.jsonl").write_text('{"prompt": "who?", "completion": "I"}\n' * 40)
    ended = command(
        "examples/sft_7b.py", "checkpoint.load=runs/mine", "data.sft=chats.jsonl", *small[:1], "train.epochs=1"
    )
    assert ended.returncode == 0, ended.stderr
    assert "loaded runs/mine/checkpoints/step-00000002, weights only" in ended.stdout
    assert len(read_metrics(Path("runs/sft-7b"))["train"]) >= 1
    # a run that kept no tokenizer: it is found by its data
    Path("runs/mine/tokenizer.model").unlink()
    ended = command("tools/generate.py", "runs/mine", "--prompt", "the", "--max-new-tokens", "2")
    assert ended.returncode == 0, ended.stderr
    ended = command("tools/checkpoint.py", "convert", "--from", "megalite", "runs/mine", "--to", "hf", "out")
    assert ended.returncode == 0, ended.stderr
    assert Path("out/tokenizer.json").is_file()


def test_the_tokenizer_that_is_not_there_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megalite.run.request import with_data_tokenizer

    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("one text")
    Path("data").mkdir()
    said = list[str]()

    def found(prefix: str, **data: Any) -> str | None:
        said.clear()
        config = Config(data=DataConfig(path=prefix, **data), train=TrainConfig(run_dir="run"))
        return with_data_tokenizer(config, said.append).data.tokenizer

    own = asset("mistral-v1/tokenizer.model").read_bytes()
    Path("data/tok.model").write_bytes(own)
    preprocess(["t.txt"], "data/t", load_tokenizer("data/tok.model"))
    Path("data").rename("moved")
    assert found("moved/t_text_document") == "moved/tok.model"  # it lay beside the data and moved with it
    Path("moved/tok.model").rename("elsewhere.model")
    assert found("moved/t_text_document") is None
    assert said == [
        "note: the tokenizer that moved/t_text_document was made with is not there or another: tok.model; generate, "
        "evaluate and export need it: set data.tokenizer"
    ]
    Path("run").mkdir()
    Path("run/tokenizer.model").write_bytes(own)  # the run has kept it when it began
    assert found("moved/t_text_document") == "run/tokenizer.model"
    assert found("moved/t_text_document", tokenizer="elsewhere.model") == "elsewhere.model"
    assert said == []
    other = str(asset("smollm2") / "tokenizer.json")
    assert found("moved/t_text_document", tokenizer=other) == other
    assert said == [f"note: moved/t_text_document was made with another file than data.tokenizer={other}: tok.model"]
    Path("moved/t_text_document.json").unlink()
    assert found("moved/t_text_document") is None
    assert said[0].startswith("note: moved/t_text_document does not say with which tokenizer it was made")


def test_conversations_made_beforehand_know_their_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megalite.run.request import with_data_tokenizer

    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text('{"prompt": "who?", "completion": "I"}\n')
    tokenizer = load_tokenizer(asset("mistral-v1/tokenizer.model"))
    template = ChatTemplate(*find_template("plain", tokenizer), tokenizer)
    write_indexed("chats.jsonl", Path("data/chats"), tokenizer, template, Options())
    config = Config(data=DataConfig(sft="data/chats"))
    assert with_data_tokenizer(config, print).data.tokenizer == str(tokenizer.path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.path=data/*"],
            "data.path=data/*: names several files, and a run reads one; make one of them with tools/",
        ),
        (["data.path=data/t_text_document,data/u"], "names several files"),
        (["data.path=0.5 data/t_text_document 0.5 data/u"], "names several files"),
        (["data.path=data/t_text_document.bin"], "name the prefix, data.path=data/t_text_document"),
        (["data.path=data"], "is a folder; name the prefix"),
        (["data.path=data/t"], "data.path=data/t: no such file; did you mean data/t_text_document?"),
        (["data.path=t.txt"], "is text; make tokens of it with tools/preprocess_data.py first"),
        (["data.path=data/none"], "data.path=data/none: data/none.idx: no such file"),
        (["data.path=data/t_text_document", "data.valid.x=data/*"], "data.valid.x=data/*: names several files"),
        (["data.path=data/t_text_document", "model.vocab_size=600"], "has 32000 tokens, model.vocab_size=600"),
        (["data.path=data/t_text_document", "train.seq_len=4096"], "tokens, but one sample of train.seq_len=4096"),
        (
            ["data.sft=*.jsonl", "data.tokenizer=tok.model"],
            "names several files, and a run reads one; make one of them with cat",
        ),
        (["data.sft=a.jsonl b.jsonl", "data.tokenizer=tok.model"], "names several files"),
        (["data.sft=chats.jsonl", "data.tokenizer=tok.model", "data.template=chatml"], "model.add_tokens"),
    ],
)
def test_a_dry_run_looks_at_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("\n\n".join(f"the {i}th line of a small text" for i in range(99)))
    Path("tok.model").write_bytes(asset("mistral-v1/tokenizer.model").read_bytes())
    Path("chats.jsonl").write_text('{"prompt": "who?", "completion": "I"}\n' * 9)
    preprocess(["t.txt"], "data/t", load_tokenizer("tok.model"), append_eod=True)
    before = sorted(Path().rglob("*"))
    words = ["train.device=cpu", "train.seq_len=32", "model.vocab_size=32000", *words, "--dry-run", "--preset", "tiny"]
    script = "examples/sft_7b.py" if any("data.sft" in word for word in words) else "examples/pretrain_7b.py"
    ended = command(script, *words)
    assert (ended.returncode, message in ended.stderr) == (2, True), ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before
