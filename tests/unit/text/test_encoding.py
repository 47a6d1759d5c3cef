"""What all tokenizers have in common: decoding, streaming, character ranges, control strings."""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece
from chats import TEXTS, TOKENIZERS
from chats import tokenizer as real_tokenizer

from megalite.text.encoding import describe_changes, is_control
from megalite.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer


def test_bytes_of_a_character_share_its_range() -> None:
    for which in TOKENIZERS:
        text = "⠿a🧑‍🚀é\n中"
        encoding = real_tokenizer(which).encode_chat(text)
        covered = sorted(set(encoding.spans))
        assert "".join(text[start:stop] for start, stop in covered) == text, which
        assert encoding.ids == real_tokenizer(which).encode(text)


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [text for text in (*map(decoder.push, ids), decoder.finish()) if text]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_decode_joins_to_decode_and_never_shows_half_a_character(either: Tokenizer, text: str):
    pieces = streamed(either, either.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_decode_returns_each_character_when_its_bytes_are_complete(tokenizer: Tokenizer):
    text = "绝代有佳人"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    assert streamed(tokenizer, ids) == list(text)


def test_stream_decode_of_broken_bytes(tokenizer: Tokenizer):
    broken = tokenizer.encode("绝")[:2]
    for ids in (broken, [*broken, *tokenizer.encode("In the")], broken * 3):
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_decode_keeps_spaces_of_models_that_strip_the_first(tmp_path: Path):

    model = io.BytesIO()
    lines = iter(["in the beginning was the word"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, vocab_size=20, minloglevel=2)
    (tmp_path / "strip.model").write_bytes(model.getvalue())
    strip = load_tokenizer(tmp_path)
    ids = strip.encode("in the beginning was the word")
    assert "".join(streamed(strip, ids)) == strip.decode(ids) == "in the beginning was the word"


def test_half_a_character_does_not_crash(either: Tokenizer):
    ids = either.encode("人民")
    for stop in range(len(ids)):
        either.decode(ids[:stop])
        either.decode(ids[stop:])


def test_special_tokens_are_left_out_of_the_text(either: Tokenizer):
    assert either.bos_id is not None
    assert either.eos_id is not None
    assert either.decode([either.bos_id, *either.encode("God"), either.eos_id]) == "God"


@pytest.mark.parametrize("token", [-1, 600])
def test_unknown_ids(tokenizer: Tokenizer, token: int):
    with pytest.raises(ValueError, match=rf"token {token} is not in 0\.\.599"):
        tokenizer.decode([5, token])


def test_fingerprint_is_of_the_file(tokenizer: Tokenizer):
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_which_added_tokens_are_control_strings() -> None:
    assert is_control("[INST]", False, ())
    assert not any(is_control(text, False, ()) for text in (" ", "▁▁", "\n\n", "a_b", "---", "covid-19"))
    assert is_control("Human:", True, ())
    assert is_control("Human:", False, ["Human:"])


def test_control_strings_become_tokens_except_in_plain_ranges() -> None:
    tokenizer = real_tokenizer("smollm2")
    text, end = "a<|im_end|>b<|im_end|>", tokenizer.controls["<|im_end|>"]
    assert tokenizer.find_controls(text) == [(1, 11), (12, 22)]
    assert tokenizer.encode_chat(text).ids.count(end) == 2
    for plain, place in (((1, 11), (12, 22)), ((12, 22), (1, 11))):
        ids, spans = tokenizer.encode_chat(text, [plain])
        assert [span for token, span in zip(ids, spans) if token == end] == [place]
        assert sorted(set(spans))[0][0] == 0
        assert max(stop for _, stop in spans) == len(text)
    assert tokenizer.control_string(end) == "<|im_end|>"
    assert tokenizer.control_string(None) is None


def test_no_changes_leave_the_fingerprint_alone() -> None:
    assert describe_changes({}, [], "", False) == ""
    assert describe_changes({"é": 1}, [], "") == '[{"é": 1}, [], ""]'
