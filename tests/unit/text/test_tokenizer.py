import hashlib
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece

from megalite.data.corpus import train_tokenizer
from megalite.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

TEXTS = ["In the beginning", "", "  two  spaces\n\n a new line\t", "床前明月光，疑是地上霜。\n", "naïve 😀 mix 山"]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level byte-pair tokenizer.json whose special tokens are named by a config beside it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("huggingface")
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(TEXTS * 3, trainer)
    built.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<end>", "bos_token": {"content": "<start>", "special": True}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@pytest.fixture(params=["tokenizer", "byte_level"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


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


def test_special_tokens_are_guessed_without_a_config(tmp_path: Path):
    import tokenizers
    from tokenizers import models

    vocabulary = {"a": 0, "<|endoftext|>": 1, "<pad>": 5}
    tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path / "tokenizer.json")
    assert (found.eos_id, found.bos_id, found.pad_id, found.vocab_size) == (1, None, 5, 6)


def test_special_tokens_are_left_out_of_the_text(either: Tokenizer):
    assert either.bos_id is not None
    assert either.eos_id is not None
    assert either.decode([either.bos_id, *either.encode("God"), either.eos_id]) == "God"


def test_half_a_character_does_not_crash(either: Tokenizer):
    ids = either.encode("人民")
    for stop in range(len(ids)):
        either.decode(ids[:stop])
        either.decode(ids[stop:])


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [text for text in (*map(decoder.push, ids), decoder.finish()) if text]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_decode_joins_to_decode_and_never_shows_half_a_character(either: Tokenizer, text: str):
    pieces = streamed(either, either.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stream_decode_gives_each_character_when_its_bytes_are_there(tokenizer: Tokenizer):
    text = "绝代有佳人"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)
    assert streamed(tokenizer, ids) == list(text)


def test_stream_decode_of_broken_bytes(tokenizer: Tokenizer):
    broken = tokenizer.encode("绝")[:2]
    for ids in (broken, [*broken, *tokenizer.encode("In the")], broken * 3):
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_decode_keeps_spaces_of_models_that_strip_the_first(tmp_path: Path):
    import io

    import sentencepiece

    model = io.BytesIO()
    lines = iter(["in the beginning was the word"] * 20)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, vocab_size=20, minloglevel=2)
    (tmp_path / "strip.model").write_bytes(model.getvalue())
    strip = load_tokenizer(tmp_path)
    ids = strip.encode("in the beginning was the word")
    assert "".join(streamed(strip, ids)) == strip.decode(ids) == "in the beginning was the word"


def test_fingerprint_is_of_the_file(tokenizer: Tokenizer):
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_training_is_deterministic():
    lines = [f"line {i} of some text" for i in range(300)]
    assert train_tokenizer(lines, 300) == train_tokenizer(lines, 300)


@pytest.mark.parametrize("token", [-1, 600])
def test_unknown_ids(tokenizer: Tokenizer, token: int):
    with pytest.raises(ValueError, match=rf"token {token} is not in 0\.\.599"):
        tokenizer.decode([5, token])


def test_files_that_are_no_tokenizer(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.model: no such tokenizer"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(ValueError, match="holds neither"):
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
