"""Both kinds of tokenizers open from a file or a folder and are lossless."""

import subprocess
import sys
from pathlib import Path

import pytest
from chats import TEXTS

from megalite.text.tokenizer import Tokenizer, load_tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_unchanged(either: Tokenizer, text: str):
    ids = either.encode(text)
    assert all(0 <= token < either.vocab_size for token in ids)
    assert either.decode(ids) == text


def test_batch_is_one_by_one(either: Tokenizer):
    assert either.encode_batch(TEXTS) == [either.encode(text) for text in TEXTS]


def test_special_tokens(tokenizer: Tokenizer, byte_level: Tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (600, 1, 2, None)
    assert (byte_level.vocab_size, byte_level.bos_id, byte_level.eos_id, byte_level.pad_id) == (300, 0, 1, None)


def test_files_that_are_not_tokenizers(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.model: no such tokenizer"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ValueError, match="contains neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "a.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"a\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "b.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"several tokenizers \(a\.model, b\.model\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)


def test_importing_the_data_side_loads_neither_torch_nor_a_tokenizer():
    code = (
        "import sys, megalite.data.corpus, megalite.data.dataset, megalite.data.ngram;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'sentencepiece', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
