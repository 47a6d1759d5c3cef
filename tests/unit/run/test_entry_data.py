"""Commands from data to answers: which tokenizer is used, and what a dry run says of the data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from assets import asset

from megalite.data.preprocess import preprocess
from megalite.text.tokenizer import load_tokenizer
from megalite.watch.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parents[3]


def command(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, REPOSITORY / script, *argv], capture_output=True, text=True, timeout=240, env=env, check=False
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
