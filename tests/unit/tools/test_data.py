"""tools/data.py as users call it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.data.packing import Conversations
from megalite.text.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "data.py"
SMOLLM2, MISTRAL = "smollm2", "mistral-v1/tokenizer.model"


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def tool(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, argv)], capture_output=True, text=True, check=False)


def test_command_line(tmp_path: Path) -> None:
    chats, prefix = tmp_path / "chats.jsonl", tmp_path / "out" / "chats"
    chats.write_text(json.dumps(row("one", "two")) + "\n{}\n", "utf-8")
    common = (chats, "--tokenizer", asset(SMOLLM2))
    result = tool("inspect-sft", *common, "--seq-len", 32)
    assert result.returncode == 0, result
    assert "<|im_start|>assistant\n⟦two<|im_end|>⟧\n" in result.stdout
    assert "1 messages rows, template chat_template.jinja, 6.1 % of 33 tokens trained" in result.stdout
    assert "warning: skipped 1 bad row " in result.stdout
    result = tool("sft", *common, "--output-prefix", prefix)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {chats}:2: has none of the keys")
    assert list(prefix.parent.iterdir()) == []
    result = tool("sft", *common, "--output-prefix", prefix, "--bad-rows", "skip")
    assert result.returncode == 0, result
    assert f"train on it with data.sft={prefix}" in result.stdout
    assert "warning: skipped 1 bad row " in result.stderr
    made = Conversations(prefix)
    assert made.lengths.tolist() == [34]
    assert [made.table[w] for w in made.weights[0]].count(1) == 2
    result = tool("sft", *common, "--output-prefix", prefix)
    assert (result.returncode, "exists; pass --overwrite" in result.stderr) == (2, True)
    for argv, message in (
        (("inspect-sft", *common, "--template", "x"), "no chat template x"),
        (("inspect-sft", tmp_path / "no.jsonl", "--tokenizer", asset(SMOLLM2)), "no such file"),
        (("inspect-sft", *common[:2], tmp_path), "contains neither a tokenizer.json nor a .model"),
    ):
        result = tool(*argv)
        assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
        assert message in result.stderr


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    rows = ({"text": f"verse {i} of the king\nand chapter {i * i} of the earth, 床前明月光"} for i in range(300))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_command(corpus: Path, tmp_path: Path) -> None:
    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), "tokenizer", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(corpus, "--vocab-size", 350, "--chat", "--output", tmp_path / "own")
    assert done.returncode == 0, done.stderr
    assert "350 tokens, control tokens <s>, </s>, <|im_start|>, <|im_end|>" in done.stdout
    assert load_tokenizer(tmp_path / "own").vocab_size == 350
    for argv, words in (
        ((corpus, "--vocab-size", 350, "--output", tmp_path / "own"), "exists; choose another --output"),
        (
            (corpus, "--vocab-size", 200, "--output", tmp_path / "x"),
            "must be above 259, the number of bytes and control tokens",
        ),
        ((corpus, "--vocab-size", 90000, "--output", tmp_path / "x"), "sentencepiece cannot train 90000 pieces"),
        ((corpus, "--vocab-size", 90000, "--type", "bpe", "--output", tmp_path / "x"), "use more text or a smaller"),
        ((tmp_path / "no.txt", "--vocab-size", 300, "--output", tmp_path / "x"), "no such file"),
    ):
        refused = run(*argv)
        (line,) = refused.stderr.splitlines()
        assert (refused.returncode, words in line) == (2, True), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "own"]
