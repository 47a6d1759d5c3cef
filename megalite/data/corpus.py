"""Prepares the demo corpus: splits it by document, trains a tokenizer on it, writes indexed files into a cache."""

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from megalite.data.preprocess import preprocess
from megalite.text.tokenizer import load_tokenizer

# Increment when the same text would produce other files, so that old caches are not reused.
RECIPE = 1
LANGUAGES = {"en": "kjv.jsonl", "zh": "poems.jsonl"}
# The Chinese part is small, so a larger share is held out: else its held-out loss is noisy.
HELDOUT_EVERY = {"en": 20, "zh": 8}


class Corpus(NamedTuple):
    """`tokenizer`: a sentencepiece model; `train`: a prefix of indexed files; `heldout`: prefixes by language."""

    tokenizer: Path
    train: Path
    heldout: dict[str, Path]


def prepare(corpus_dir: str | Path, cache_dir: str | Path, vocab_size: int = 600, zh_repeat: int = 4) -> Corpus:
    """Split, tokenize and index `kjv.jsonl` and `poems.jsonl`; later calls find the files in the cache.

    Every 20th chapter and every 8th poem are held out. Each training poem is repeated `zh_repeat` times. An
    end-of-document token follows each document. Safe to call from several processes at once.

    Raises ValueError for settings out of range and missing files.
    """
    if not 300 <= vocab_size <= 800:
        raise ValueError(f"vocab_size={vocab_size} must be in 300..800; 260 pieces are bytes and special tokens")
    if zh_repeat < 0:
        raise ValueError(f"zh_repeat={zh_repeat} must be 0 or more")
    rows = {language: _rows(Path(corpus_dir) / name) for language, name in LANGUAGES.items()}
    folder = Path(cache_dir) / f"corpus-{_key(rows, vocab_size, zh_repeat)}"
    build_once(folder, lambda building: _build(building, rows, vocab_size, zh_repeat))
    return Corpus(
        folder / "tokenizer.model",
        folder / "train_text_document",
        {language: folder / f"heldout_{language}_text_document" for language in LANGUAGES},
    )


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Create `folder`, unless it exists, with the files that `build` writes into a temporary one; all or nothing.

    Several processes may call this at once if they write the same files.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        build(building)
        building.chmod(0o755)
        building.rename(folder)
    except OSError:
        # another process has created the folder
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _rows(path: Path) -> list[bytes]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the demo corpus is examples/corpus of the repository")
    return path.read_bytes().splitlines(keepends=True)


def _key(rows: dict[str, list[bytes]], vocab_size: int, zh_repeat: int) -> str:
    import sentencepiece

    digest = hashlib.sha256(f"{RECIPE} {sentencepiece.__version__} {vocab_size} {zh_repeat}".encode())
    for row in chain.from_iterable(rows.values()):
        digest.update(row)
    return digest.hexdigest()[:16]


def _build(folder: Path, rows: dict[str, list[bytes]], vocab_size: int, zh_repeat: int) -> None:
    train: dict[str, list[bytes]] = {}
    for language, every in HELDOUT_EVERY.items():
        heldout = rows[language][every - 1 :: every]
        train[language] = [row for number, row in enumerate(rows[language], start=1) if number % every]
        (folder / f"heldout_{language}.jsonl").write_bytes(b"".join(heldout))
    (folder / "train.jsonl").write_bytes(b"".join(train["en"] + train["zh"] * zh_repeat))
    model = folder / "tokenizer.model"
    model.write_bytes(train_tokenizer(_lines(chain(train["en"], train["zh"])), vocab_size))
    tokenizer = load_tokenizer(model)
    for name in ("train", *(f"heldout_{language}" for language in LANGUAGES)):
        preprocess([folder / f"{name}.jsonl"], folder / name, tokenizer, append_eod=True)
        (folder / f"{name}.jsonl").unlink()


def _lines(rows: Iterable[bytes]) -> Iterable[str]:
    for row in rows:
        yield from filter(None, json.loads(row)["text"].split("\n"))


def train_tokenizer(
    lines: Iterable[str], vocab_size: int, coverage: float = 0.9945, controls: Sequence[str] = ()
) -> bytes:
    """Train a lossless byte-pair sentencepiece model and return the bytes of its file.

    coverage: the share of character occurrences in `lines` that get pieces. Other characters become bytes, such as most
    Chinese ones in the demo, whose few hundred pieces cannot cover thousands of characters. controls: additional
    control tokens. Newline has its own piece.

    Raises ValueError if the text is too small for `vocab_size`.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            control_symbols=list(controls),
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"sentencepiece cannot train {vocab_size} pieces on this text: {reason}") from error
    return model.getvalue()
