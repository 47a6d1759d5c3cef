"""Keeps control strings that users type into messages from becoming control tokens.

A user who types <|im_end|> must not end the turn. The string is encoded as ordinary pieces and the text is unchanged.
If the template reads the message, so that marks in it would change the output, a zero-width space after the string's
first character breaks it up instead.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megalite.text.encoding import Range, Tokenizer
from megalite.text.messages import Conversation, Message, RowError

# around a typed control string while a template renders it; no text may contain them
BEGIN, END = "\ufdd2", "\ufdd3"

# text -> ranges of its control strings
Find = Callable[[str], Sequence[Range]]


class Controls:
    """The control strings of a tokenizer.

    `find` returns all of those in a text; `find_in_answer` leaves out paired tags such as <think> and </think>, which
    the assistant is meant to write.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.find: Find = tokenizer.find_controls
        special = set(tokenizer.named.values())
        self._tags = {
            text
            for name in tokenizer.controls
            if name.startswith("</") and (text := "<" + name[2:]) in tokenizer.controls and text not in special
        }
        self._tags |= {"</" + text[1:] for text in self._tags}

    def find_in_answer(self, text: str) -> Sequence[Range]:
        return [found for found in self.find(text) if text[slice(*found)] not in self._tags]

    def escape(self, conversation: Conversation, begin: str, end: str, after: int) -> tuple[Conversation, int]:
        """Return the conversation with the control strings in its messages and tools escaped, and their number.

        `begin` is inserted `after` characters into each string, `end` after it.
        """
        count = 0
        messages: list[Message] = []
        for message in conversation.messages:
            find = self.find_in_answer if message["role"] == "assistant" else self.find
            escaped, found = escape_controls(message, find, begin, end, after)
            messages.append(escaped)
            count += found
        tools, found = escape_controls(conversation.tools, self.find, begin, end, after)
        return replace(conversation, messages=messages, tools=tools), count + found


def controls_of(tokenizer: Tokenizer) -> Controls | None:
    """The control strings of a tokenizer, or None if it has none."""
    return Controls(tokenizer) if tokenizer.controls else None


def escape_controls(value: Any, find: Find, begin: str = "\u200b", end: str = "", after: int = 1) -> tuple[Any, int]:
    """Return `value`, text or nested lists and mappings of text, with its control strings escaped, and their number.

    `begin` is inserted `after` characters into each string, `end` after it. The default, a zero-width space, is
    invisible to readers.
    """
    if isinstance(value, str):
        escaped, at = "", 0
        ranges = find(value)
        for start, stop in ranges:
            escaped += value[at : start + after] + begin + value[start + after : stop] + end
            at = stop
        return escaped + value[at:], len(ranges)
    if isinstance(value, (list, tuple)):
        items = [escape_controls(item, find, begin, end, after) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if isinstance(value, Mapping):
        found = {key: escape_controls(item, find, begin, end, after) for key, item in value.items()}
        return {key: item for key, (item, _) in found.items()}, sum(count for _, count in found.values())
    return value, 0


def protect_controls(
    conversation: Conversation, render: Callable[[Conversation], str], tokenizer: Tokenizer, controls: Controls
) -> tuple[Conversation, int, int]:
    """Return a conversation whose control strings render as text, their number, and how many had to be changed.

    The strings are put between marks, which `strip_marks` removes after rendering. If marks would change the rendered
    text, the strings are broken up instead.
    """
    marked, found = controls.escape(conversation, BEGIN, END, 0)
    if not found:
        return conversation, 0, 0
    text = render(conversation)
    try:
        stripped = strip_marks(render(marked))
    except RowError:
        stripped = strip_marks("")
    if stripped.text == text:
        encoding, numbers = tokenizer.encode_chat(text, stripped.ranges), set(tokenizer.controls.values())
        if not any(
            token in numbers and any(start < b and a < stop for a, b in stripped.ranges)
            for token, (start, stop) in zip(encoding.ids, encoding.spans)
        ):
            return marked, found, 0
    changed, _ = controls.escape(conversation, "\u200b", "", 1)
    return changed, found, found


@dataclass(frozen=True)
class Stripped:
    """A text without marks. `ranges`: the text that was between them. `marks`: their positions in the marked text."""

    text: str
    ranges: list[Range]
    marks: list[int]

    def at(self, position: int) -> int:
        """Convert a position in the marked text to one in `text`."""
        return position - bisect_left(self.marks, position)


def strip_marks(text: str) -> Stripped:
    """Remove the marks of `protect_controls`. Raises RowError if they are not in pairs."""
    marks = [found.start() for found in re.finditer(f"[{BEGIN}{END}]", text)]
    if [text[mark] for mark in marks] != [BEGIN, END] * (len(marks) // 2):
        raise RowError("a message contains U+FDD2 or U+FDD3, which Unicode reserves for programs; remove it")
    places = [mark - number for number, mark in enumerate(marks)]
    clean = re.sub(f"[{BEGIN}{END}]", "", text)
    return Stripped(clean, list(zip(places[::2], places[1::2])), marks)
