"""Hugging Face tokenizer files without their folder, and with faults."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from megalite.text.tokenizer import load_tokenizer


def test_special_tokens_are_guessed_without_a_config(tmp_path: Path):
    import tokenizers
    from tokenizers import models

    vocabulary = {"a": 0, "<|endoftext|>": 1, "<pad>": 5}
    tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.eos_id, found.bos_id, found.pad_id, found.vocab_size) == (1, None, 5, 6)


def test_a_pattern_that_panics_is_one_line(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE({"a": 0}, []))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("aaa") == [0, 0, 0]
    for cut in (tokenizer.encode, tokenizer.encode_chat, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(
            ValueError, match=r"tokenizer\.json: the tokenizers library cannot split this text"
        ) as caught:
            cut("a" * 40 + "!")
        assert "\n" not in str(caught.value)


def byte_pairs(folder: Path, alphabet: str = "ab ", **added: Any) -> Path:
    """A tokenizer.json of single characters."""
    made = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    made.add_special_tokens([AddedToken(content, **flags) for content, flags in added.items()])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_that_drops_characters_is_refused_for_chats(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_pairs(tmp_path))
    assert tokenizer.encode("azb") == [0, 1]
    assert tokenizer.encode_chat("ab").spans == [(0, 1), (1, 2)]
    with pytest.raises(ValueError, match=r"tokenizer\.json: drops characters that are not in its vocabulary"):
        tokenizer.encode_chat("az")


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    path = byte_pairs(tmp_path)
    file = Tokenizer.from_file(str(path))
    file.enable_truncation(2)
    file.enable_padding(length=8, pad_token="a", pad_id=0)
    file.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("abab") == [0, 1, 0, 1]
    assert tokenizer.encode_batch(["a", "ab"]) == [[0], [0, 1]]


def test_a_saved_tokenizer_has_the_added_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_pairs(tmp_path), ["<new>"])
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out" / "tokenizer.json")  # type: ignore[attr-defined]
    again = load_tokenizer(tmp_path / "out")
    assert again.encode("a<new>b") == tokenizer.encode("a<new>b") == [0, 3, 1]
    assert (again.controls, again.vocab_size) == ({"<new>": 3}, 4)


def test_spaces_around_a_control_token_are_not_its_characters(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_pairs(tmp_path, **{"<s>": {"lstrip": True, "rstrip": True}}))
    ids, spans = tokenizer.encode_chat("a <s> b")
    assert ids == [0, 3, 1]
    assert spans == [(0, 1), (2, 5), (6, 7)]


def test_a_class_with_its_own_steps_needs_byte_pairs(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ValueError, match=r"tokenizer_class=GPT2Tokenizer needs a BPE vocabulary, .* has WordLevel"):
        load_tokenizer(tmp_path)
