"""Evaluation rows, few-shot examples and scores of answers. No torch, so mistakes are reported before it loads."""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megalite.inference.source import Source
from megalite.text.rows import nonblank_lines, parse_json, text_fault
from megalite.text.tokenizer import Tokenizer

R = TypeVar("R", "Question", "Cloze")
HAN = "\u3400-\u4dbf\u4e00-\u9fff"


@dataclass(frozen=True)
class Question:
    """A question with free-text answers. `answers`: each of them is correct. `where`: file:line."""

    prompt: str
    answers: tuple[str, ...]
    where: str = field(default="", compare=False, repr=False)

    @property
    def right(self) -> str:
        return self.answers[0]


@dataclass(frozen=True)
class Cloze:
    """A multiple-choice question. `label`: index of the correct choice. `where`: file:line."""

    prompt: str
    choices: tuple[str, ...]
    label: int
    where: str = field(default="", compare=False, repr=False)

    @property
    def right(self) -> str:
        return self.choices[self.label]


def read_questions(path: str | Path) -> list[Question]:
    """Read rows {"prompt": text, "answer": text or list of texts} from a JSONL file. Raises ValueError at file:line."""
    found = []
    for where, row in _json_rows(Path(path)):
        answer = row.get("answer")
        answers: list[Any] = answer if isinstance(answer, list) else [answer]
        if not isinstance(row.get("prompt"), str) or not answers or not all(isinstance(a, str) for a in answers):
            raise ValueError(f'{where}: expected {{"prompt": text, "answer": text or list of texts}}')
        _require_text(where, row["prompt"], *answers)
        found.append(Question(row["prompt"], tuple(answers), where))
    return found


def read_clozes(path: str | Path) -> list[Cloze]:
    """Read rows {"prompt": text, "choices": [text, ...], "label": index} from a JSONL file. Raises ValueError."""
    found = []
    for where, row in _json_rows(Path(path)):
        choices, label = row.get("choices"), row.get("label")
        valid = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        if not isinstance(row.get("prompt"), str) or not valid:
            raise ValueError(f'{where}: expected {{"prompt": text, "choices": [text, text, ...], "label": number}}')
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(row["choices"]):
            raise ValueError(f"{where}: label {label!r} is not the number of a choice, 0 to {len(row['choices']) - 1}")
        _require_text(where, row["prompt"], *row["choices"])
        found.append(Cloze(row["prompt"], tuple(row["choices"]), label, where))
    return found


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    where = ""
    for where, raw in nonblank_lines(path):
        try:
            row = parse_json(raw)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found a {type(row).__name__}")
        yield where, row
    if not where:
        raise ValueError(f"{path}: contains no rows")


def _require_text(where: str, *texts: str) -> None:
    for text in texts:
        if fault := text_fault(text):
            raise ValueError(f"{where}: a text in it {fault}")


def choose_shots(rows: Sequence[R], pool: Sequence[R] | None, count: int, seed: int) -> tuple[list[R], list[R]]:
    """Return (`count` example rows, rows to test); no prompt is in both.

    Examples are drawn from `pool` without the prompts in `rows`, or, if `pool` is None, from `rows`, which are then
    tested without them. The same seed draws the same rows. Raises ValueError if there are too few.
    """
    if count < 0:
        raise ValueError(f"shots={count} must not be negative")
    tested = {row.prompt for row in rows} if pool is not None else set()
    candidates = list(
        {row.prompt: row for row in (rows if pool is None else pool) if row.prompt not in tested}.values()
    )
    if count > len(candidates) - (pool is None):
        raise ValueError(f"shots={count}, but only {len(candidates)} rows are available as examples; use fewer shots")
    shots = random.Random(seed).sample(candidates, count)
    shown = {row.prompt for row in shots}
    return shots, [row for row in rows if row.prompt not in shown]


def with_shots(shots: Sequence[Question | Cloze], prompt: str, delimiter: str = " ") -> str:
    """The examples with their correct answers, then the prompt, separated by blank lines."""
    return "\n\n".join([*(join(shot.prompt, shot.right, delimiter) for shot in shots), prompt])


def join(prompt: str, answer: str, delimiter: str = " ") -> str:
    """Join prompt and answer with the delimiter, unless there is white space between them already."""
    spaced = not prompt or prompt[-1].isspace() or answer[:1].isspace()
    return prompt + ("" if spaced else delimiter) + answer


def split(tokenizer: Tokenizer, prompt: str, answer: str, delimiter: str = " ") -> tuple[list[int], list[int]]:
    """(tokens of the prompt, tokens of the answer), tokenized together and then split.

    Trailing space of the prompt counts as the answer's, as in most tokenizers and lm-evaluation-harness.
    """
    whole, context = tokenizer.encode(join(prompt, answer, delimiter)), tokenizer.encode(prompt.rstrip())
    return whole[: len(context)], whole[len(context) :]


def cloze_sequences(
    source: Source, rows: Sequence[Cloze], shots: Sequence[Cloze], delimiter: str = " "
) -> list[list[tuple[list[int], list[int]]]]:
    """[row][choice] (context, continuation) in token ids. Raises ValueError for a choice that cannot be scored."""
    found: list[list[tuple[list[int], list[int]]]] = []
    for number, row in enumerate(rows, start=1):
        name = row.where or f"row {number}"
        prompt = with_shots(shots, row.prompt, delimiter)
        found.append([])
        for choice in row.choices:
            context, continuation = split(source.tokenizer, prompt, choice, delimiter)
            context = [*source.start, *context]
            length = len(context) + len(continuation)
            if not context or not continuation:
                raise ValueError(f"{name}: prompt and choice {choice!r} need at least one token each; extend the row")
            if source.limit is not None and length > source.limit:
                raise ValueError(
                    f"{name}: {length} tokens with choice {choice!r}, but the model has {source.limit} "
                    f"positions; use fewer shots or a shorter prompt"
                )
            found[-1].append((context, continuation))
    return found


class Scores(NamedTuple):
    """Per choice: log-likelihood in nats, length in tokens, length in characters."""

    sums: list[float]
    tokens: list[int]
    characters: list[int]

    def best(self, lengths: Sequence[int] | None = None) -> int:
        """Index of the choice with the largest sum, or sum / length; of equal ones the first."""
        values = self.sums if lengths is None else [s / n for s, n in zip(self.sums, lengths, strict=True)]
        return values.index(max(values))


def normalise(text: str) -> str:
    """Lower-case and remove punctuation (of all scripts), articles and repeated spaces (Rajpurkar et al. 2016,
    "SQuAD", section 6)."""
    kept = (c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", "".join(kept)).split())


def exact_match(reply: str, answers: Sequence[str]) -> float:
    """1 if `reply` equals one of the answers after `normalise`, else 0."""
    return float(any(normalise(reply) == normalise(answer) for answer in answers))


def token_f1(reply: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 of words, for the best-matching answer; each Chinese character is a word."""
    return max(_f1(_words(reply), _words(answer)) for answer in answers)


def _words(text: str) -> list[str]:
    return re.sub(f"([{HAN}])", r" \1 ", normalise(text)).split()


def _f1(reply: Sequence[str], right: Sequence[str]) -> float:
    if not reply or not right:
        return float(reply == right)
    shared = (Counter(reply) & Counter(right)).total()
    return 2 * shared / (len(reply) + len(right))
