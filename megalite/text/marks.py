"""Invisible marks around the texts of messages, which show where a template writes each message.

A mark is three characters that no text may contain: START or STOP, then the message's number, then the kind of text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from megalite.text.messages import REASONING, Message, has_reasoning

START, STOP = "\ufdd4", "\ufdd5"
# the kind of text a mark surrounds; CALL + i is the name of the i-th tool call of a message
CONTENT, THOUGHT, ARGUMENTS, CALL = range(4)
# numbers and kinds are encoded as characters from here on
_FIRST = 0xF0000
_MARK = re.compile("[\ufdd4\ufdd5][\U000f0000-\U000ffffd]{2}")
# mark the start and the end of a text
BOTH = (True, True)


class Mark(NamedTuple):
    """A decoded mark; `at` is its position in the text without marks."""

    start: bool
    kind: int
    message: int
    at: int


def with_marks(message: Message, number: int, ends: tuple[bool, bool] = BOTH) -> Message:
    """Return a copy of a message with marks inside its texts, where a template's trimming does not remove them.

    ends: whether to mark the start and the end of each text.
    """
    marked = dict(message)
    if "input" in message and "instruction" in message:
        marked["instruction"] = _inside(message["instruction"], number, CONTENT, (ends[0], False))
        marked["input"] = _inside(message["input"], number, CONTENT, (False, ends[1]))
    marked["content"] = _inside(message["content"], number, CONTENT, ends)
    if message["role"] != "assistant":
        return marked
    if has_reasoning(message):
        marked |= {key: _inside(message[key], number, THOUGHT, ends) for key in REASONING if key in message}
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, number, CALL + i, ends) for i, call in enumerate(calls)]
    return marked


def _marked_call(call: Message, number: int, kind: int, ends: tuple[bool, bool]) -> Message:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _marked_call(call["function"], number, kind, ends)}
    return {**call, "name": _inside(call["name"], number, kind, ends)}


def _inside(text: str, number: int, kind: int, ends: tuple[bool, bool]) -> str:
    inner = (text or "").strip()
    if not inner:
        return text
    first = text.index(inner)
    start, stop = (encode_mark(sign, number, kind) * wanted for sign, wanted in zip((START, STOP), ends))
    return text[:first] + start + inner + stop + text[first + len(inner) :]


def encode_mark(sign: str, number: int, kind: int) -> str:
    """Return the three characters of a mark; `sign` is START or STOP."""
    return sign + chr(_FIRST + number) + chr(_FIRST + kind)


def split_marks(text: str) -> tuple[str, list[Mark]]:
    """Return the text without marks, and the marks in order."""
    parts, marks, at, done = [], [], 0, 0
    for match in _MARK.finditer(text):
        parts.append(text[done : match.start()])
        at += match.start() - done
        done = match.end()
        number, kind = (ord(each) - _FIRST for each in match[0][1:])
        marks.append(Mark(match[0][0] == START, kind, number, at))
    return "".join(parts) + text[done:], marks
