"""Other programs on an exported folder, by the commands of docs/generate.md, say and measure what megalite does."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from megalite.config import ModelConfig, resolve_model
from megalite.config.shapes import shapes
from megalite.data.corpus import train_tokenizer
from megalite.exchange.convert import to_hf_folder, write_run
from megalite.model.init import draw
from megalite.text.chat import BUILT_IN

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "examples" / "corpus"
PAGE = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 64}
MODEL = resolve_model(ModelConfig(vocab_size=500, **SHAPE, init_std=0.3), 256)
START_S = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights, exported; no byte is ever the likeliest, so that what it says is text."""
    root = tmp_path_factory.mktemp("model")
    texts = [json.loads(line)["text"] for line in (CORPUS / "kjv.jsonl").open(encoding="utf-8")][::40]
    (root / "tokenizer.model").write_bytes(train_tokenizer(texts, MODEL.vocab_size))
    (root / "chat_template.jinja").write_bytes((BUILT_IN / "plain.jinja").read_bytes())
    whole = shapes(MODEL)

    def weight(name: str) -> torch.Tensor:
        values = draw(name, whole[name], MODEL, 11)
        if name == "loss_head.head.weight":
            values[3:259] = 0
        return values

    files = [root / "tokenizer.model", root / "chat_template.jinja"]
    write_run(root / "run", MODEL, weight, dict.fromkeys(whole, torch.float32), context=256, files=files)
    return to_hf_folder(root / "run", root / "exported")


def command(start: str, **places: object) -> list[str]:
    """The command of the page that begins so, with other places and numbers in it."""
    (line,) = (line for line in PAGE.replace("\\\n", " ").splitlines() if line.startswith(start))
    for name, value in places.items():
        assert name in line
        line = line.replace(name, str(value))
    program, *words = shlex.split(line)
    return [sys.executable, *words] if program == "python" else [str(Path(sys.executable).with_name(program)), *words]


def output(words: list[str], cwd: Path = ROOT) -> str:
    ended = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=os.environ | OFFLINE, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_transformers_serves_what_megalite_says(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    question = "Who was in the beginning?"
    said = output([*command("python tools/generate.py MODEL --chat", MODEL=folder)[:3], "--chat", question,
                   "--temperature", "0", "--max-new-tokens", "24", "--device", "cpu"])  # fmt: skip
    assert len(said) > 24
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path / "log").open("w+")
    words = command("transformers serve", DIR=folder)
    words[words.index("8000")] = str(port)
    server = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | OFFLINE, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        body = {"model": str(folder), "messages": [{"role": "user", "content": question}]}
        body |= {"temperature": 0, "max_tokens": 24}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (choice,) = json.load(answer)["choices"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        log.close()
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].strip() == said.strip()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)


def test_lm_eval_counts_what_megalite_counts(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    choices = ["God", "the man in the land", "a light of heaven", "water"]
    starts = ("In the beginning was", "And he said,", "Let there be", "They went to", "Of the tree came", "So it was")
    rows = [
        {"prompt": f"{start} {word}", "choices": choices, "label": (i + j) % 4}
        for i, start in enumerate(starts)
        for j, word in enumerate(("not", "then"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    found = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    (tmp_path / "tasks" / "choices.yaml").write_text(found[1], encoding="utf-8")
    words = command("lm_eval run", DIR=folder)
    output([*words, "--output_path", str(tmp_path / "theirs")], cwd=tmp_path)
    (file,) = (tmp_path / "theirs").rglob("results*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]["choices"]
    ours = tmp_path / "ours.json"
    rest = ["--device", "cpu", "--json", str(ours)]
    output([sys.executable, "tools/evaluate.py", "choices", str(folder), str(tmp_path / "rows.jsonl"), *rest])
    figures = json.loads(ours.read_text(encoding="utf-8"))
    assert figures["tested"] == 12
    assert theirs["acc,none"] == pytest.approx(figures["accuracy"])
    assert theirs["acc_norm,none"] == pytest.approx(figures["accuracy_per_character"])
    assert 0 < figures["accuracy"] < 1
