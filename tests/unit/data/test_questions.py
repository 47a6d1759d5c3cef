"""The demo's questions are right, reproducible, and held out by phrasing and by source."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megalite.data.questions import BOOKS, HELDOUT_ROWS, PHRASINGS, in_words, make_rows, prepare_questions

CORPUS = Path(__file__).parents[3] / "examples" / "corpus"


def phrasing_of(task: str, question: str) -> set[str]:
    """The phrasings that may have produced a question."""
    patterns = {each: re.escape(each).replace(r"\{\}", "(.+)") for each in PHRASINGS[task]}
    return {each for each, pattern in patterns.items() if re.fullmatch(pattern, question)}


def test_heldout_questions_share_neither_phrasing_nor_source_with_training() -> None:
    training, heldout = make_rows(CORPUS)
    for task in PHRASINGS:
        known, unknown = ([row for row in rows if row.task == task] for rows in (training, heldout))
        assert len(known) > 1000
        assert len(unknown) > 50
        assert not {row.source for row in known} & {row.source for row in unknown}
        assert not {row.question for row in known} & {row.question for row in unknown}
        assert all(phrasing_of(task, row.question) >= {PHRASINGS[task][-1]} for row in unknown)
        assert all(phrasing_of(task, row.question) - {PHRASINGS[task][-1]} for row in known)


def test_answers_are_right() -> None:
    numbers = {in_words(number): number for number in range(100)}
    lines = [line for name in ("kjv", "poems") for line in (CORPUS / f"{name}.jsonl").read_text("utf-8").splitlines()]
    texts = {row["id"]: row["text"].split("\n") for row in map(json.loads, lines)}
    for row in (row for rows in make_rows(CORPUS) for row in rows):
        if row.task == "sum":
            terms = [numbers[word] for word in re.findall(r"[a-z-]+", row.question.lower()) if word in numbers]
            assert numbers[row.answer] == sum(terms) == sum(map(int, row.source.split(" + ")))
        elif row.task == "book":
            assert row.answer in BOOKS
            assert row.source.startswith(row.answer)
            assert any(verse in row.question for verse in texts[row.source])
        else:
            assert any(a in row.question and b == row.answer for a, b in pairwise(texts[row.source]))


def test_the_same_each_time(tmp_path: Path) -> None:
    first = prepare_questions(CORPUS, tmp_path)
    assert prepare_questions(CORPUS, tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.train.parent.name]
    tasks = [json.loads(line)["task"] for line in first.heldout.read_text("utf-8").splitlines()]
    assert all(0 < tasks.count(task) <= HELDOUT_ROWS for task in PHRASINGS)


@pytest.mark.parametrize(("number", "words"), [(0, "zero"), (19, "nineteen"), (20, "twenty"), (48, "forty-eight")])
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words


def test_a_number_without_words() -> None:
    with pytest.raises(ValueError, match=re.escape("100 is not in 0..99")):
        in_words(100)
