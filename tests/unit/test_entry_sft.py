"""What a user of examples/sft_7b.py gets wrong, told as by the other script."""

import json
from pathlib import Path

import pytest
from assets import asset
from test_entry import ONE, REPOSITORY, refusal

SCRIPT = REPOSITORY / "examples" / "sft_7b.py"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "sft-7b"], "data.sft is not set: which conversations should the model learn from?"),
        (["train.epochs=2", "train.steps=3"], "train.steps=3 and train.epochs=2 are both set; set one of them"),
        (["train.epochs=0"], "train.epochs=0.0 must be greater than 0"),
        (["data.path=a", "data.sft=b.jsonl"], "data.path=a and data.sft=b.jsonl are both set"),
        (["data.sft=b.jsonl"], "data.sft=b.jsonl: text needs data.tokenizer"),
        (["data.train_on=answer"], "data.train_on=answer: must be one of assistant, last, all"),
        (["data.max_length=7"], "unknown key data.max_length; here it is train.seq_len"),
        (["train.num_train_epochs=3"], "unknown key train.num_train_epochs; here it is train.epochs"),
    ],
)
def test_mistakes(tmp_path: Path, argv: list[str], words: str) -> None:
    assert words in refusal(tmp_path, *ONE, *argv, seconds=30, script=SCRIPT)
    assert not (tmp_path / "run").exists()


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": 7}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = f"data.tokenizer={asset('mistral-v1/tokenizer.model')}"
    argv = [*ONE, tokenizer, "data.sft=chats.jsonl", "model.vocab_size=32000"]
    said = refusal(tmp_path, *argv, "data.template=plain", seconds=30, script=SCRIPT)
    assert said == "chats.jsonl:2: 'completion' is a number, expected text (data.bad_rows=skip leaves such rows out)"
    assert "has no chat template beside it" in refusal(tmp_path, *argv, seconds=30, script=SCRIPT)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(9)))
    said = refusal(tmp_path, *argv[:4], "data.template=plain", seconds=30, script=SCRIPT)
    assert "is not in 0..599 as model.vocab_size=600 asks" in said
