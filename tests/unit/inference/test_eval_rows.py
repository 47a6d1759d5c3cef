import json
from pathlib import Path

import pytest
from assets import asset

from megalite.inference.eval_rows import (
    Cloze,
    Question,
    Scores,
    choose_shots,
    exact_match,
    normalise,
    read_clozes,
    read_questions,
    split,
    token_f1,
    with_shots,
)
from megalite.text.tokenizer import load_tokenizer


def test_normalise() -> None:
    assert normalise(" The  cat, a dog & an “Owl”! ") == "cat dog owl"
    assert normalise("theatre") == "theatre"
    assert normalise("北京。") == "北京"


@pytest.mark.parametrize(
    ("reply", "answers", "match", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1, 1),
        ("Eiffel Tower in Paris", ["Eiffel Tower"], 0, 2 * 2 / (4 + 2)),
        ("Paris", ["London", "paris"], 1, 1),
        ("big big dog", ["big dog dog"], 0, 2 * 2 / (3 + 3)),  # each word as often as in both
        ("no", ["yes"], 0, 0),
        ("", ["yes"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of either
        ("中国北京", ["北京"], 0, 2 * 2 / (4 + 2)),
    ],
)
def test_answers_are_scored_as_squad_does(reply: str, answers: list[str], match: float, f1: float) -> None:
    assert exact_match(reply, answers) == match
    assert token_f1(reply, answers) == pytest.approx(f1)


def test_scores() -> None:
    scores = Scores([-6.0, -4.0, -4.0], tokens=[4, 2, 1], characters=[3, 4, 4])
    assert (scores.best(), scores.best(scores.tokens), scores.best(scores.characters)) == (1, 0, 1)


def questions(names: str) -> list[Question]:
    return [Question(name, (name.upper(),)) for name in names]


def test_shots_are_never_tested() -> None:
    rows = questions("abcdefgh")
    shots, tested = choose_shots(rows, None, 3, seed=1)
    assert len(shots) == 3
    assert tested == [row for row in rows if row not in shots]
    assert choose_shots(rows, None, 3, seed=1) == (shots, tested)
    assert {tuple(choose_shots(rows, None, 3, seed)[0]) for seed in range(9)} != {tuple(shots)}
    shots, tested = choose_shots(rows, questions("xahyz"), 3, seed=0)
    assert {row.prompt for row in shots} == set("xyz")
    assert tested == rows
    assert choose_shots(rows, None, 0, seed=0) == ([], rows)


@pytest.mark.parametrize(("pool", "count"), [(None, 8), ("ab", 1), ("xx", 2), (None, -1)])
def test_too_few_shots(pool: str | None, count: int) -> None:
    with pytest.raises(ValueError, match="shots="):
        choose_shots(questions("abcdefgh"), None if pool is None else questions(pool), count, 0)


def test_a_prompt_with_shots() -> None:
    shots = [Question("Q: 1?\nA:", ("one", "uno")), Cloze("Q: 2?\nA: ", ("x", "two"), 1)]
    assert with_shots(shots, "Q: 3?\nA:") == "Q: 1?\nA: one\n\nQ: 2?\nA: two\n\nQ: 3?\nA:"
    assert with_shots(shots[:1], "三？", delimiter="") == "Q: 1?\nA:one\n\n三？"


@pytest.mark.parametrize("name", ["smollm2", "mistral-v1/tokenizer.model"])
@pytest.mark.parametrize("prompt", ["The capital is", "The capital is ", "首都是"])
def test_prompt_and_answer_are_cut_out_of_their_joint_tokens(name: str, prompt: str) -> None:
    tokenizer = load_tokenizer(asset(name))
    context, answer = split(tokenizer, prompt, "Paris")
    assert context + answer == tokenizer.encode(prompt.rstrip() + " Paris")
    assert tokenizer.decode(answer).strip() == "Paris"


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_questions, {"prompt": "a"}, r":2: expected {"),
        (read_questions, {"prompt": "a", "answer": []}, r":2: expected {"),
        (read_questions, {"prompt": 1, "answer": "b"}, r":2: expected {"),
        (read_questions, ["a"], r":2: expected a JSON object, found a list"),
        (read_clozes, {"prompt": "a", "choices": ["b"], "label": 0}, r":2: expected {"),
        (read_clozes, {"prompt": "a", "choices": ["b", ""], "label": 0}, r":2: expected {"),
        (
            read_clozes,
            {"prompt": "a", "choices": ["b", "c"], "label": 2},
            r":2: label 2 is not the number of a choice, 0 to 1",
        ),
        (read_clozes, {"prompt": "a", "choices": ["b", "c"], "label": True}, r":2: label True"),
    ],
)
def test_a_wrong_row_is_named(read, row, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read(file)
    file.write_text("{broken")
    with pytest.raises(ValueError, match=":1: not JSON"):
        read(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="contains no rows"):
        read(file)
