"""sentencepiece models: character ranges, and tokens that other files add."""

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import transformers
from assets import asset

from megalite.text.tokenizer import load_tokenizer
from megalite.text.tokenizer_spm import SentencePieceTokenizer, _bytes_field, _fields, _raw_fields


def test_offsets_of_a_model_that_normalises(tmp_path: Path) -> None:
    """NFKC joins, splits and drops characters: ranges stay within the text, in order, and on characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        control_symbols=["<c>"],
        minloglevel=2,
        num_threads=1,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert tokenizer.controls == {"<s>": 1, "</s>": 2, "<c>": 3}
    draw = random.Random(0)
    parts = [
        "a",
        " ",
        "  ",
        "\n",
        "é",
        "e\u0301",
        "ﬁ",
        "①",
        "㌔",
        "\u1112\u1161\u11ab",
        "🙂",
        "\u200b",
        "\u00a0",
        "<c>",
    ]
    for _ in range(1000):
        text = "".join(draw.choice(parts) for _ in range(draw.randrange(12)))
        ids, spans = tokenizer.encode_chat(text)
        assert len(ids) == len(spans)
        assert all(0 <= start <= stop <= len(text) for start, stop in spans), text
        assert spans == sorted(spans), text
        assert ids.count(3) == text.count("<c>")


def test_tokens_that_other_files_add_to_a_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(asset("mistral-v1/tokenizer.model").read_bytes())
    plain = load_tokenizer(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"}
    config["added_tokens_decoder"] = {  # type: ignore[assignment]
        str(32000 + i): {"content": text, "special": True} for i, text in enumerate(("<|im_start|>", "<|im_end|>"))
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (32001, 32002)
    text = "<|im_start|>user\nhi there<|im_end|>\n<s> a"
    assert tokenizer.encode_chat(text).ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode("a<|im_end|>") == [*plain.encode("a"), 32001]
    assert tokenizer.decode(tokenizer.encode("hi <|im_end|>there")) == "hi there"


@pytest.mark.parametrize("size", [0, 1, 127, 128, 300, 20_000])
def test_protobuf_fields_of_any_length_are_read(size: int) -> None:
    value = b"x" * size
    message = b"\x08\x96\x01" + _bytes_field(2, value) + b"\x1d1234" + _bytes_field(15, b"end")
    assert list(_fields(message)) == [(1, 150), (2, value), (3, b"1234"), (15, b"end")]
    assert b"".join(raw for _, _, raw in _raw_fields(message)) == message


def test_only_user_defined_symbols_are_replaced_by_aliases(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox"] * 9),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|end|>", "\n"],
        control_symbols=["<c>"],
        minloglevel=2,
        num_threads=1,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "t.model")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert set(tokenizer.defined) == {"<|end|>", "\n"}
    assert {"<|end|>", "<c>"} <= set(tokenizer.controls)
    assert "\n" not in tokenizer.controls
    text, end = "fox<|end|>\nfox<|end|>", tokenizer.defined["<|end|>"]
    assert tokenizer.encode_chat(text).ids.count(end) == 2
    ids, spans = tokenizer.encode_chat(text, [(3, 10)])
    assert [span for token, span in zip(ids, spans) if token == end] == [(14, 21)]
    assert tokenizer.defined["\n"] in ids
