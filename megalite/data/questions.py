"""Makes questions from the demo corpus: which book a verse is from, the next line of a poem, sums in words.

Held-out questions share neither phrasing nor source with training questions: they have other chapters, poems and pairs
of numbers. Pretraining holds out the same chapters and poems.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from megalite.data.corpus import HELDOUT_EVERY, LANGUAGES, build_once
from megalite.text.rows import nonblank_lines, parse_json

# the last phrasing of each task is held out
PHRASINGS = {
    "book": (
        "Which book is this verse from? {}",
        "Name the book of this verse: {}",
        "{} Which book is this?",
        "What book has this verse? {}",
        "Give the book: {}",
        "{} From which book is that?",
        "What is the book of this verse? {}",
    ),
    "poem": (
        "续写下一句：{}",
        "“{}”的下一句是什么？",
        "请接下一句：{}",
        "{}下一句呢？",
        "下一句是什么？{}",
    ),
    "sum": (
        "What is {} plus {}?",
        "Add {} and {}.",
        "{} plus {} makes what?",
        "What do {} and {} make?",
        "Give the sum of {} and {}.",
        "{} and {} make how much?",
        "Sum: {} plus {}.",
        "How much do {} and {} make?",
        "How much is {} plus {}?",
    ),
}
# how many phrasings each training question is asked in
ASKED = {"book": 1, "poem": 1, "sum": 30}
# books that differ in style: a model of this size cannot distinguish all 66
BOOKS = ("Genesis", "Leviticus", "Psalms", "Proverbs", "Isaiah", "Matthew", "Acts", "Revelation")
# fmt: off
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
LARGEST_TERM = 24
# one pair of numbers in so many is held out, in both orders
SUM_HELDOUT_EVERY = 8
VERSE_CHARACTERS = range(30, 121)
# held-out rows per task
HELDOUT_ROWS = 100


class Row(NamedTuple):
    """One question and its only right answer; `source` is its chapter, poem or pair of numbers."""

    task: str
    question: str
    answer: str
    source: str


class Questions(NamedTuple):
    """JSONL files: `train` has rows of `messages`, `heldout` rows of {"prompt", "answer", "task"}."""

    train: Path
    heldout: Path


def prepare_questions(corpus_dir: str | Path, cache_dir: str | Path) -> Questions:
    """Write the questions of a corpus into a cache; later calls find them. Safe to call from several processes."""
    training, heldout = make_rows(corpus_dir)
    chosen = [row for task in PHRASINGS for row in [row for row in heldout if row.task == task][:HELDOUT_ROWS]]
    files = {
        "train": _lines({"messages": _turns(row.question, row.answer)} for row in training),
        "heldout": _lines({"prompt": row.question, "answer": row.answer, "task": row.task} for row in chosen),
    }
    folder = Path(cache_dir) / f"questions-{hashlib.sha256(b''.join(files.values())).hexdigest()[:16]}"

    def write(building: Path) -> None:
        for name, content in files.items():
            (building / f"{name}.jsonl").write_bytes(content)

    build_once(folder, write)
    return Questions(folder / "train.jsonl", folder / "heldout.jsonl")


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def in_words(number: int) -> str:
    """Return `number`, 0 to 99, in English words. Raises ValueError for other numbers."""
    if not 0 <= number < 100:
        raise ValueError(f"{number} is not in 0..99")
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def make_rows(corpus_dir: str | Path, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows), each shuffled with `seed`."""
    rng = random.Random(seed)
    training: list[Row] = []
    heldout: list[Row] = []
    for task, filled, answer, source, is_heldout in _facts(Path(corpus_dir)):
        *known, unknown = PHRASINGS[task]
        phrasings = [unknown] if is_heldout else [rng.choice(known) for _ in range(ASKED[task])]
        rows = [Row(task, phrasing.format(*filled), answer, source) for phrasing in phrasings]
        (heldout if is_heldout else training).extend(rows)
    rng.shuffle(training)
    rng.shuffle(heldout)
    return training, heldout


def _facts(corpus_dir: Path) -> Iterator[tuple[str, tuple[str, ...], str, str, bool]]:
    """Yield (task, arguments of the phrasing, answer, source, whether it is held out)."""
    texts = {
        language: [parse_json(line.raw) for line in nonblank_lines(corpus_dir / name)]
        for language, name in LANGUAGES.items()
    }
    for number, chapter in enumerate(texts["en"], start=1):
        book = chapter["id"].rpartition(" ")[0]
        for verse in chapter["text"].split("\n"):
            if book in BOOKS and len(verse) in VERSE_CHARACTERS:
                yield "book", (verse,), book, chapter["id"], number % HELDOUT_EVERY["en"] == 0
    for number, poem in enumerate(texts["zh"], start=1):
        lines = poem["text"].split("\n")
        for line, following in pairwise(lines):
            yield "poem", (line,), following, poem["id"], number % HELDOUT_EVERY["zh"] == 0
    for low in range(LARGEST_TERM + 1):
        for high in range(low, LARGEST_TERM + 1):
            is_heldout = random.Random(100 * low + high).randrange(SUM_HELDOUT_EVERY) == 0
            for pair in {(low, high), (high, low)}:
                words = in_words(pair[0]), in_words(pair[1])
                yield "sum", words, in_words(low + high), f"{low} + {high}", is_heldout
