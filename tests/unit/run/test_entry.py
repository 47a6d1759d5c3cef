"""What a user gets wrong is told in one line within seconds: torch is not imported before the mistakes are found."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from assets import asset

from megalite.checkpoint.save import write_whole
from megalite.checkpoint.state import State
from megalite.config import parse_command_line
from megalite.config.shapes import shapes
from megalite.data.indexed import IndexedWriter
from megalite.plan.topology import lay_out
from megalite.run.entry import machine_of

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "examples" / "pretrain_7b.py"
SFT = REPOSITORY / "examples" / "sft_7b.py"
ONE = ["parallel.tp=1", "parallel.pp=1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A prefix of indexed data with tokens 0 to 99."""
    prefix = tmp_path / "data" / "text"
    with IndexedWriter(prefix, vocab_size=1000) as writer:
        for _ in range(60):
            writer.add_document(range(100))
    return prefix


def refusal(tmp_path: Path, *argv: str, seconds: float = 3.0, script: Path = SCRIPT) -> str:
    """Start the script as one plain process; the one line that it must end with, after `error: `."""
    # a torch that cannot be imported: whoever tries before the mistake is told fails the test
    (tmp_path / "fake" / "torch").mkdir(parents=True, exist_ok=True)
    (tmp_path / "fake" / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, script, "--preset", "tiny", "train.device=cpu", f"train.run_dir={tmp_path / 'run'}", *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path / "fake")},
        timeout=60,
    )
    assert time.monotonic() - began < seconds, result
    assert result.returncode == 2, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train.stepz=3"], "unknown key train.stepz; did you mean train.steps?"),
        (["train.steps=many"], "train.steps=many: expected int"),
        (["train.steps"], "train.steps: not an override; write key=value"),
        (["--preset", "tinny"], "--preset tinny: there is"),
        (["--config", "missing.yaml"], "--config missing.yaml: no such file"),
        (["parallel.tp=3"], "parallel.tp=3 does not divide model.num_heads=4; use 1, 2 or 4"),
        (["parallel.tp=2", "parallel.pp=2"], "= 4 ranks, but the world size is 1 (without torchrun there is one"),
        ([*ONE, "parallel.dp=2"], "= 2 ranks, but the world size is 1"),
        (["parallel.tp=1", "parallel.pp=5"], "parallel.pp=5 stages need at least 5 layers, model.num_layers=4"),
        ([*ONE, "train.global_batch_size=12"], "train.global_batch_size=12 is not a multiple of"),
        ([*ONE, "train.threads=1000"], "train.threads=1000 per rank on a machine with"),
        (
            [*ONE, "optim.groups=embedding.weight lr_scale=0"],
            "optim.groups: no parameter is named embedding.weight; did",
        ),
        ([*ONE, "data.path=missing/text"], "missing/text.idx: no such file"),
        ([*ONE, "checkpoint.resume=must"], "checkpoint.resume=must, but"),
        ([*ONE, "checkpoint.load=missing"], "missing: no such folder; name a run folder"),
    ],
)
def test_wrong_settings(tmp_path: Path, data: Path, argv: list[str], words: str) -> None:
    assert words in refusal(tmp_path, f"data.path={data}", *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 3", "line 1: not valid YAML"),
        ("train:\n  steps: 3\n  steps: 4\n", "line 3: key 'steps' is written twice"),
        ("- train\n", "expected sections"),
        ("\udcff", "not UTF-8 text"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "my.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    line = refusal(tmp_path, "--config", "my.yaml")
    assert line.startswith("my.yaml")
    assert words in line


def truncate(prefix: Path) -> None:
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-7])


def cut_index(prefix: Path) -> None:
    path = prefix.with_suffix(".idx")
    path.write_bytes(path.read_bytes()[:20])


def empty(prefix: Path) -> None:
    IndexedWriter(prefix, vocab_size=1000).close()


def too_large(prefix: Path) -> None:
    with IndexedWriter(prefix, vocab_size=1000) as writer:
        for _ in range(100):
            writer.add_document([1, 2, 3, 700])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "text.bin: is 11993 bytes, expected 12000"),
        (cut_index, "text.idx: is 20 bytes, shorter than"),
        (empty, "text: the data has 0 tokens"),
        (too_large, "token 700 at position 3 (document 0) is outside 0..599"),
    ],
)
def test_damaged_data(tmp_path: Path, data: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(data)
    for more in ([], ["data.valid_fraction=0"]):
        assert words in refusal(tmp_path, *ONE, f"data.path={data}", *more)
    assert not (tmp_path / "run").exists()


def test_the_run_folder_is_somebody_elses(tmp_path: Path, data: Path) -> None:
    run_dir, argv = tmp_path / "run", [*ONE, f"data.path={data}"]
    run_dir.write_text("mine")
    assert "is a file; name a folder" in refusal(tmp_path, *argv)
    assert run_dir.read_text() == "mine"
    run_dir.unlink()
    run_dir.mkdir()
    (run_dir / "thesis.tex").touch()
    assert "holds other files; choose a new or empty folder" in refusal(tmp_path, *argv)
    assert os.listdir(run_dir) == ["thesis.tex"]


def test_the_checkpoint_is_of_another_model(tmp_path: Path, data: Path) -> None:
    request = parse_command_line(["model.num_layers=9"], default_preset="tiny", prog="test")
    config = lay_out(request.config, machine_of(request), request.explicit)[0]
    described = {f"weight.{name}": (torch.bfloat16, shape) for name, shape in shapes(config.model).items()}
    folder = write_whole(
        tmp_path / "run" / "checkpoints" / "step-00000010",
        config,
        described,
        lambda name: torch.zeros(described[name][1], dtype=torch.bfloat16),
        dataclasses.asdict(State(step=10, consumed_samples=320)),
    )
    text = (folder / "manifest.json").read_text()
    words = f"{folder} holds another model: model.num_layers is 9 there and 4 here"
    assert words in refusal(tmp_path, *ONE, f"data.path={data}")
    elsewhere = [f"train.run_dir={tmp_path / 'new'}", f"checkpoint.load={tmp_path / 'run'}"]
    assert words in refusal(tmp_path, *ONE, f"data.path={data}", *elsewhere)

    (folder / "manifest.json").write_text(text[:-9])
    assert f"{folder}/manifest.json: not a manifest" in refusal(tmp_path, *ONE, f"data.path={data}")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "125m"], "data.sft is not set: which conversations should the model learn from?"),
        (["train.epochs=2", "train.steps=3"], "train.steps=3 and train.epochs=2 are both set; set one of them"),
        (["train.epochs=0"], "train.epochs=0.0 must be greater than 0"),
        (["data.path=a", "data.sft=b.jsonl"], "data.path=a and data.sft=b.jsonl are both set"),
        (["data.sft=b.jsonl"], "data.sft=b.jsonl: text needs data.tokenizer"),
        (["data.train_on=answer"], "data.train_on=answer: must be one of assistant, last, all"),
        (["data.max_length=7"], "unknown key data.max_length; here it is train.seq_len"),
        (["train.num_train_epochs=3"], "unknown key train.num_train_epochs; here it is train.epochs"),
    ],
)
def test_mistakes_in_tuning(tmp_path: Path, argv: list[str], words: str) -> None:
    assert words in refusal(tmp_path, *ONE, *argv, seconds=30, script=SFT)
    assert not (tmp_path / "run").exists()


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": 7}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = f"data.tokenizer={asset('mistral-v1/tokenizer.model')}"
    argv = [*ONE, tokenizer, "data.sft=chats.jsonl", "model.vocab_size=32000"]
    said = refusal(tmp_path, *argv, "data.template=plain", seconds=30, script=SFT)
    assert said == "chats.jsonl:2: 'completion' is a number, expected text (data.bad_rows=skip skips such rows)"
    assert "has no chat template next to it" in refusal(tmp_path, *argv, seconds=30, script=SFT)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(9)))
    said = refusal(tmp_path, *argv[:4], "data.template=plain", seconds=30, script=SFT)
    assert "has 32000 tokens, model.vocab_size=600; name the tokenizer that the model was made with" in said


def test_the_plan_of_lora_beside_a_hugging_face_folder(tmp_path: Path) -> None:
    """What `--dry-run` shows: the preset's tuning, the folder's model and tokenizer, the data; nothing is written."""
    row = {"prompt": "p", "completion": "c"}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(9)))
    model = asset("smollm2")
    words = ["--preset", "sft-7b-lora", f"model.from_hf={model}", "data.sft=chats.jsonl", "train.device=cpu"]
    ended = subprocess.run(
        [sys.executable, SFT, *words, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert "tune.mode=lora trains 4.884e6 of 139.4e6 parameters (3.50%)" in ended.stdout
    for line in ("lora_rank: 16", "lora_alpha: 32.0", "lora_dropout: 0.05", "recompute: full", "zero: 1", "lr: 0.0002"):
        assert f"\n  {line}\n" in ended.stdout
    assert f"\n  tokenizer: {model / 'tokenizer.json'}\n" in ended.stdout
    assert "\nplan:\n" in ended.stdout
    assert "\ndata: chats.jsonl: 8 conversations in 1 rows of 4096; one epoch is 1 samples\n" in ended.stdout
    assert "train.epochs=3 of 1 samples: 1 steps" in ended.stdout
    assert os.listdir(tmp_path) == ["chats.jsonl"]
