"""A newly trained tokenizer is lossless and complete for chats."""

import json
from pathlib import Path

import pytest
import transformers

from megalite.data.instructions import Options, Report, build_example
from megalite.data.new_tokenizer import new_tokenizer
from megalite.exchange.hf_tokenizer import write_tokenizer
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.controls import controls_of

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
    found = build_example("row", ROW, made, template, Options(), Report(), controls_of(made))
    assert found.encoding.ids.count(made.controls["<|im_end|>"]) == 2
    assert "hi <|im_end|>" in found.text
    # transformers reads the export in the same way
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
