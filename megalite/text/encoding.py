"""The interface of tokenizers: ids, character ranges, control strings, decoding of a stream of ids."""

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

# Precedes the control strings of a template, where the text may also contain the same strings as ordinary text.
# A Unicode noncharacter, so no text contains it.
ALIAS = "\ufdd2"
Range = tuple[int, int]


class Encoding(NamedTuple):
    """Token ids, and the characters [start, stop) of each; bytes of one character share its range."""

    ids: list[int]
    spans: list[Range]


class Tokenizer(ABC):
    """Converts text to token ids and back; never adds special tokens.

    `vocab_size`: one more than the largest id. `eos_id`, `bos_id`, `pad_id`: None if absent. `controls`: ids by control
    string, the strings with which chat templates begin and end turns (see `is_control`). `named`: strings of special
    tokens by their names in templates, such as eos_token. `templates`: chat templates of the folder, by name.
    `prefix`: ids that transformers puts before every text, such as <s>; `encode` does not. `folds`: whether text is
    normalised first, so that other strings may become control tokens too.
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
    # what the other files of the folder change about the tokenizer, as text
    changes: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""

    def encode_chat(self, text: str, plain: Sequence[Range] = ()) -> Encoding:
        """Encode a rendered chat: its control strings, such as `</s>`, become control tokens.

        Those in the ranges `plain` are text and are split as by a tokenizer without control tokens. sentencepiece adds
        no space after a control string, because the template writes its own.
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
        """Implement encode_chat. If `aliased`, only control strings after ALIAS become control tokens."""

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches control strings, the longest first."""
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def find_controls(self, text: str) -> list[Range]:
        """Return the ranges of text that would become control tokens, in order and without overlaps."""
        found = [match.span() for match in self.control_pattern.finditer(text)]
        if self.folds:
            ids, spans = self._encode_chat(text, False)
            numbers = set(self.controls.values())
            for token, (start, stop) in zip(ids, spans):
                if token in numbers and not any(a < stop and start < b for a, b in found):
                    found.append((start, stop))
        return sorted(found)

    def control_string(self, token: int | None) -> str | None:
        """Return the string of a control token, or None if it is not one."""
        return next((text for text, found in self.controls.items() if found == token), None)

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens; invalid UTF-8 becomes U+FFFD.

        Raises ValueError for ids outside the vocabulary.
        """
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
        """sha256 of the tokenizer file and of what the other files of its folder change; hexadecimal."""
        return hashlib.sha256(self.path.read_bytes() + self.changes.encode()).hexdigest()


def is_control(content: str, special: bool, named: Iterable[str]) -> bool:
    """Whether an added token can begin or end turns in a template.

    True for special tokens, and for others that look like tags: punctuation at both ends and a letter or digit between,
    such as <|im_end|> or [/INST]. Added runs of spaces and added words are ordinary text.
    """
    if special or content in named:
        return True
    ends = (content[0], content[-1])
    return not any(c.isalnum() or c.isspace() or c == "▁" for c in ends) and any(c.isalnum() for c in content)


def describe_changes(*changes: object) -> str:
    """Return `changes` as JSON, or "" if all are empty."""
    return json.dumps(changes, ensure_ascii=False) if any(changes) else ""


class StreamDecoder:
    """Decodes ids as they arrive; an incomplete UTF-8 character is held back until its bytes are complete.

    The concatenated pieces equal `decode` of all ids when they follow the ids `before`.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # The last complete group is decoded again with new ids, because a lone piece may lose its leading space.
        self._context, self._pending = list(before), list[int]()

    def push(self, token: int) -> str:
        """Return the text that `token` completes, "" inside a character."""
        self._pending.append(token)
        return "" if (text := self._text()).endswith("\ufffd") else self._take(text)

    def finish(self) -> str:
        """Return the text still held back; incomplete bytes become U+FFFD."""
        return self._take(self._text()) if self._pending else ""

    def _text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)

    def _take(self, text: str) -> str:
        new = text[len(self._tokenizer.decode(self._context)) :]
        self._context, self._pending = self._pending, []
        return new
