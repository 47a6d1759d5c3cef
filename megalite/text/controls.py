"""Control strings in what people write: found before a template renders it, and kept from becoming control tokens.

Whoever writes <|im_end|> into a message must not end its turn. The string is encoded as ordinary pieces and the text
stays as it is; where a template looks into the message, so that marks in it would change what is rendered, a zero-width
space behind the first character breaks the string up.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megalite.text.encoding import Range, Tokenizer
from megalite.text.messages import Conversation, Message, RowError

# before and behind a control string that is text, while a template renders it; no text may hold them
BEGIN, END = "\ufdd2", "\ufdd3"

# where control strings stand in a text
Find = Callable[[str], Sequence[Range]]


class Controls:
    """The control strings of a tokenizer. `answers` finds those that an assistant's message may not hold.

    It may hold tags in pairs, <think> and </think>: they are what such a model is meant to say.
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

    def answers(self, text: str) -> Sequence[Range]:
        return [found for found in self.find(text) if text[slice(*found)] not in self._tags]

    def escape(self, conversation: Conversation, begin: str, end: str, after: int) -> tuple[Conversation, int]:
        """The conversation with `begin` put `after` characters into each control string and `end` behind it; how many.

        The strings are those in messages and tools.
        """
        count = 0
        messages: list[Message] = []
        for message in conversation.messages:
            find = self.answers if message["role"] == "assistant" else self.find
            done, found = escape_controls(message, find, begin, end, after)
            messages.append(done)
            count += found
        tools, found = escape_controls(conversation.tools, self.find, begin, end, after)
        return replace(conversation, messages=messages, tools=tools), count + found


def control_pattern(tokenizer: Tokenizer) -> Controls | None:
    """What finds the control strings of a tokenizer; None where it has none."""
    return Controls(tokenizer) if tokenizer.controls else None


def escape_controls(value: Any, find: Find, begin: str = "\u200b", end: str = "", after: int = 1) -> tuple[Any, int]:
    """`value`, text or nested lists and mappings of it, with `begin` put `after` characters into each string found and
    `end` behind it; and how many. A zero-width space, the default, leaves it the same for readers."""
    if isinstance(value, str):
        done, at = "", 0
        ranges = find(value)
        for start, stop in ranges:
            done += value[at : start + after] + begin + value[start + after : stop] + end
            at = stop
        return done + value[at:], len(ranges)
    if isinstance(value, (list, tuple)):
        items = [escape_controls(item, find, begin, end, after) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if isinstance(value, Mapping):
        found = {key: escape_controls(item, find, begin, end, after) for key, item in value.items()}
        return {key: item for key, (item, _) in found.items()}, sum(count for _, count in found.values())
    return value, 0


def keep_text(
    conversation: Conversation, render: Callable[[Conversation], str], tokenizer: Tokenizer, controls: Controls
) -> tuple[Conversation, int, int]:
    """The conversation to render so that control strings in it stay text, how many, and how many had to be changed.

    They stand between marks, see `unmark`, or where that would change what the template writes are broken up.
    """
    marked, found = controls.escape(conversation, BEGIN, END, 0)
    if not found:
        return conversation, 0, 0
    text = render(conversation)
    try:
        there = unmark(render(marked))
    except RowError:
        there = unmark("")
    if there.text == text:
        encoding, numbers = tokenizer.encode_chat(text, there.ranges), set(tokenizer.controls.values())
        if not any(
            token in numbers and any(start < b and a < stop for a, b in there.ranges)
            for token, (start, stop) in zip(encoding.ids, encoding.spans)
        ):
            return marked, found, 0
    changed, _ = controls.escape(conversation, "\u200b", "", 1)
    return changed, found, found


@dataclass(frozen=True)
class Unmarked:
    """A text without its marks, and the ranges that stood between them; `at` gives a position with marks without."""

    text: str
    ranges: list[Range]
    marks: list[int]

    def at(self, position: int) -> int:
        return position - bisect_left(self.marks, position)


def unmark(text: str) -> Unmarked:
    """RowError where a mark stands alone: a template tore a pair apart, or it was in the text before."""
    marks = [found.start() for found in re.finditer(f"[{BEGIN}{END}]", text)]
    if [text[mark] for mark in marks] != [BEGIN, END] * (len(marks) // 2):
        raise RowError("a message holds U+FDD2 or U+FDD3, which Unicode reserves for programs; remove it")
    places = [mark - number for number, mark in enumerate(marks)]
    clean = re.sub(f"[{BEGIN}{END}]", "", text)
    return Unmarked(clean, list(zip(places[::2], places[1::2])), marks)
