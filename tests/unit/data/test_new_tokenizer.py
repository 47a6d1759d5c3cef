"""A tokenizer of one's own in one command: every text comes back, and chats need nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from megalite.data.instructions import Options, Report, _example
from megalite.data.new_tokenizer import new_tokenizer
from megalite.exchange.hf_tokenizer import write_tokenizer
from megalite.text.chat import ChatTemplate, control_pattern, find_template
from megalite.text.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "data.py"
TEXTS = ["In the beginning", "  two  spaces\n\n a new line\t", "床前明月光，疑是地上霜。\n", "naïve 😀 <|im_end|> 山"]
ROW = {"messages": [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": " the king"}]}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "c.jsonl"
    rows = ({"text": f"verse {i} of the king\nand chapter {i * i} of the earth, 床前明月光"} for i in range(300))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_text_and_chats_come_back(corpus: Path, tmp_path: Path, kind: str) -> None:
    made = new_tokenizer([corpus], tmp_path / "own", 400, kind, chat=True)
    assert made.vocab_size == 400
    assert {"<|im_start|>", "<|im_end|>"} <= made.controls.keys()
    assert made.eos_id is not None
    for text in TEXTS[:3]:
        assert made.decode(made.encode(text)) == text
    template = ChatTemplate(*find_template(None, made), made)
    found = _example("row", ROW, made, template, Options(), Report(), control_pattern(made))
    assert found.encoding.ids.count(made.controls["<|im_end|>"]) == 2
    assert "hi <|im_end|>" in found.text
    # exported, it is the same to transformers
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "own", tmp_path / "out", model_type="llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    clean = [{"role": "user", "content": "hi\n\n you"}, ROW["messages"][1]]
    text = theirs.apply_chat_template(clean, tokenize=False)
    assert theirs(text, add_special_tokens=False)["input_ids"] == made.encode_chat(text).ids
    assert theirs.eos_token_id == made.eos_id


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_it_is_the_same_each_time(corpus: Path, tmp_path: Path, kind: str) -> None:
    first, second = (new_tokenizer([corpus], tmp_path / name, 350, kind) for name in ("a", "b"))
    assert first.fingerprint == second.fingerprint


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
        ((corpus, "--vocab-size", 200, "--output", tmp_path / "x"), "259 are taken by bytes and control tokens"),
        ((corpus, "--vocab-size", 90000, "--output", tmp_path / "x"), "sentencepiece cannot train 90000 pieces"),
        ((corpus, "--vocab-size", 90000, "--type", "bpe", "--output", tmp_path / "x"), "use more text or a smaller"),
        ((tmp_path / "no.txt", "--vocab-size", 300, "--output", tmp_path / "x"), "no such file"),
    ):
        refused = run(*argv)
        (line,) = refused.stderr.splitlines()
        assert (refused.returncode, words in line) == (2, True), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "own"]
