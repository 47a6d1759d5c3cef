"""What every tokenizer can do, whatever file it comes from."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

# Stands before a control string that a template wrote where the same string may also stand in the text as text.
# Unicode reserves it for programs, so no text holds it.
ALIAS = "\ufdd2"
Range = tuple[int, int]


class Encoding(NamedTuple):
    """Ids, and the characters [start, stop) that each stands for; the bytes of one character share its range."""

    ids: list[int]
    spans: list[Range]


class Tokenizer(ABC):
    """Text to token ids and back; never adds special tokens by itself.

    `vocab_size` is one more than the largest id; `eos_id`, `bos_id`, `pad_id` are None where absent. `controls`: ids by
    the strings that a chat template writes to begin and end turns (see `is_control`). `named`: the strings of special
    tokens as templates know them, by names as eos_token. `templates`: chat templates beside the file, by name.
    `prefix`: what a Hugging Face folder has its own library put before every text, as <s>; `encode` does not. `folds`:
    whether text that does not hold a control string may become its token, for it is normalised first.
    """

    path: Path
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    controls: dict[str, int]
    named: dict[str, str]
    templates: dict[str, str]
    template_file: str
    prefix: tuple[int, ...]
    folds: bool
    # what the files beside the tokenizer's own change about it, as text
    changes: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def encode_chat(self, text: str, plain: Sequence[Range] = ()) -> Encoding:
        """The ids of a rendered chat with their characters: control strings in it, as `</s>`, are control tokens.

        Not those in the ranges `plain`: they are text, cut as a tokenizer without these tokens would cut it. Behind a
        control string sentencepiece puts no space of its own: a template writes the one it wants.
        """
        if not plain:
            return self._encode_chat(text, False)
        pieces, starts, at = list[str](), list[int](), 0
        for found in self.control_pattern.finditer(text):
            if not any(start < found.end() and found.start() < stop for start, stop in plain):
                pieces.append(text[at : found.start()])
                starts.append(found.start())
                at = found.start()
        marks = [start + number for number, start in enumerate(starts)]
        ids, spans = self._encode_chat(ALIAS.join([*pieces, text[at:]]), True)

        def original(position: int) -> int:
            return position - bisect_left(marks, position)

        return Encoding(ids, [(original(start), original(stop)) for start, stop in spans])

    @abstractmethod
    def _encode_chat(self, text: str, aliased: bool) -> Encoding:
        """As encode_chat; `aliased`: a control string counts only behind ALIAS."""

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds control strings, at each place the longest."""
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def find_controls(self, text: str) -> list[Range]:
        """Where text would become control tokens, in order and apart from each other."""
        found = [match.span() for match in self.control_pattern.finditer(text)]
        if self.folds:
            ids, spans = self._encode_chat(text, False)
            numbers = set(self.controls.values())
            for token, (start, stop) in zip(ids, spans):
                if token in numbers and not any(a < stop and start < b for a, b in found):
                    found.append((start, stop))
        return sorted(found)

    def control_string(self, token: int | None) -> str | None:
        """The string that stands for a control token."""
        return next((text for text, found in self.controls.items() if found == token), None)

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        known = list(ids)
        for token in known:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token {token} is not in 0..{self.vocab_size - 1} of {self.path}; "
                    f"decode with the tokenizer the model was trained with"
                )
        return self._decode(known)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer file, and of what the files beside it change; hexadecimal."""
        return hashlib.sha256(self.path.read_bytes() + self.changes.encode()).hexdigest()


def is_control(content: str, special: bool, named: Iterable[str]) -> bool:
    """Whether a token that is found in text before anything else can speak for a template.

    All special tokens can, and others that look like marks: punctuation at both ends and a letter or digit between, as
    <|im_end|> or [/INST]. Runs of spaces and words that were added to the vocabulary are ordinary text.
    """
    if special or content in named:
        return True
    ends = (content[0], content[-1])
    return not any(c.isalnum() or c.isspace() or c == "▁" for c in ends) and any(c.isalnum() for c in content)


def describe_changes(*changes: object) -> str:
    """`changes` as text, and "" where there is none."""
    return json.dumps(changes, ensure_ascii=False) if any(changes) else ""


class StreamDecoder:
    """Text piece by piece as ids arrive; an unfinished UTF-8 character is held back until its bytes are there.

    The pieces joined are `decode` of all ids, as it reads after the ids of `before`.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The last finished group is decoded again with the new ids: alone, a piece may lose its leading space.
        self._context, self._pending = list(before), list[int]()

    def push(self, token: int) -> str:
        """The text that `token` completes, "" in the middle of a character."""
        self._pending.append(token)
        return "" if (text := self._text()).endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """What was held back; bytes that no character came of are U+FFFD."""
        return self._take(self._text()) if self._pending else ""

    def _text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)

    def _take(self, text: str) -> str:
        new = text[len(self._tokenizer.decode(self._context)) :]
        self._context, self._pending = self._pending, []
        return new
