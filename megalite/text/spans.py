"""Locates the assistant's turns in a rendered conversation whose template has no generation tags.

The conversation is rendered twice: as it is, and with marks inside its messages. If both texts are equal once the marks
are removed, the marks locate each message; otherwise they are discarded. A turn starts where the prompt before it ends.
It stops after the control token that the template writes next, whatever message follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from megalite.text.marks import BOTH, Mark, split_marks, with_marks
from megalite.text.messages import Message, RowError

# (messages, whether to append the generation prompt) -> text
Render = Callable[[Sequence[Message], bool], str]


class Span(NamedTuple):
    """Characters [start, stop) of the assistant's messages `since` to `message`, which are usually the same."""

    start: int
    stop: int
    message: int
    since: int


class Turns:
    """The messages of one conversation, located in its rendered `text`.

    `render` renders other messages with the same template. `controls` matches the tokenizer's control strings.
    """

    def __init__(
        self, text: str, messages: Sequence[Message], render: Render, controls: re.Pattern[str] | None
    ) -> None:
        self.text, self.messages, self._render, self._controls = text, messages, render, controls
        # equal messages get equal marks, because some templates find the last user message by comparing messages
        self._number = [
            index if message["role"] == "assistant" else messages.index(message)
            for index, message in enumerate(messages)
        ]
        self._ends: dict[int, tuple[bool, bool]] = {}

    @cached_property
    def marks(self) -> list[Mark]:
        """The reliable marks, in text order: those that do not change the rest of the text."""
        numbers = sorted(set(self._number))
        if (found := self._try(dict.fromkeys(numbers, BOTH))) is not None:
            self._ends = dict.fromkeys(numbers, BOTH)
            return found
        # the template reads its messages, so mark them one at a time, at both ends or at one
        marks = []
        for number in numbers:
            for ends in (BOTH, (False, True), (True, False)):
                if (found := self._try({number: ends})) is not None:
                    self._ends[number] = ends
                    marks += found
                    break
        return sorted(marks, key=lambda mark: mark.at)

    def marks_of(self, index: int) -> list[Mark]:
        """The marks of one message at its own place, not those where a later message quotes it."""
        return self._select(self.marks, index)

    def _select(self, marks: Sequence[Mark], index: int) -> list[Mark]:
        own = [mark for mark in marks if mark.message == self._number[index]]
        if self.messages[index]["role"] != "assistant":
            return own
        return sorted({mark[:3]: mark for mark in reversed(own)}.values(), key=lambda mark: mark.at)

    def answers_in(self, start: int, stop: int) -> list[int]:
        """The numbers of the assistant's messages that overlap characters [start, stop)."""
        inside = [mark for mark in self.marks if (start <= mark.at < stop if mark.start else start < mark.at <= stop)]
        if inside:
            return sorted({mark.message for mark in inside if self._is_answer(mark)})
        before = [mark for mark in self.marks if mark.at <= start][-1:]
        after = [mark for mark in self.marks if mark.at >= stop][:1]
        first = before[0].message + 1 if before else 0
        last = after[0].message if after else len(self.messages)
        for index in range(first, last):  # an answer without any text
            if self.messages[index]["role"] == "assistant" and not self.marks_of(index):
                return [index]
        return [mark.message for mark in before + after if self._is_answer(mark)][:1]

    def _is_answer(self, mark: Mark) -> bool:
        return bool(self.messages[mark.message]["role"] == "assistant")

    def can_mark(self, index: int) -> bool:
        """Whether marks inside a message leave the rest of the text unchanged."""
        _ = self.marks
        return self._number[index] in self._ends

    def _try(self, ends: Mapping[int, tuple[bool, bool]]) -> list[Mark] | None:
        try:
            text, marks = self._render_marked(self.messages, ends)
        except RowError:
            return None
        return marks if text == self.text else None

    def _render_marked(
        self, messages: Sequence[Message], ends: Mapping[int, tuple[bool, bool]], prompt: bool = False
    ) -> tuple[str, list[Mark]]:
        """Render messages with marks; return the text without them, and the marks."""
        numbers = self._number + list(range(len(self._number), len(messages)))
        marked = [
            with_marks(message, number, ends[number]) if number in ends else message
            for message, number in zip(messages, numbers)
        ]
        return split_marks(self._render(marked, prompt))

    def span(self, turn: int) -> Span:
        """The characters of the assistant's message `turn`. Raises RowError if they are ambiguous."""
        own = self.marks_of(turn)
        if not own:
            return self._empty_span(turn)
        start = self._start(turn, own)
        stop = self._stop(turn, own[-1])
        others = (mark for mark in self.marks if mark.message != self._number[turn])
        if stop < start or any(start <= mark.at < stop for mark in others):
            raise RowError(f"message {turn + 1}: the template writes another message inside the assistant's text")
        return Span(start, stop, turn, turn)

    def _with_letter(self, turn: int) -> Turns:
        """The same conversation with the text of message `turn` replaced by one letter."""
        letter = {"role": "assistant", "content": "x"}
        messages = [*self.messages[:turn], letter, *self.messages[turn + 1 :]]
        return Turns(self._render(messages, False), messages, self._render, self._controls)

    def _empty_span(self, turn: int) -> Span:
        """The span of a message without text: that of a one-letter message, less the letter."""
        other = self._with_letter(turn)
        if not other.marks_of(turn):
            raise RowError(_ambiguous(turn))
        span, at = other.span(turn), other.marks_of(turn)[0].at
        if other.text[:at] + other.text[at + 1 :] != self.text:
            raise RowError(_ambiguous(turn))
        return Span(span.start, span.stop - 1, turn, turn)

    def _start(self, turn: int, own: Sequence[Mark]) -> int:
        """The end of the prompt for message `turn`."""
        try:
            prompt = self._render(self.messages[:turn], True)
        except RowError:
            return self._first_header(turn)
        if self.text.startswith(prompt):
            self._check_prompt(turn, prompt)
            return len(prompt)
        # the prompt renders earlier messages differently: compare only what follows the message before this one
        before, tail = 0, prompt
        if turn:
            text, marks = self._render_marked(self.messages[:turn], self._ends, prompt=True)
            in_prompt = [mark for mark in marks if mark.message == self._number[turn - 1]]
            here = [mark for mark in self.marks_of(turn - 1) if mark.at <= own[0].at]
            if text != prompt or not in_prompt or not here or in_prompt[-1][:3] != here[-1][:3]:
                raise RowError(_ambiguous(turn))
            before, tail = here[-1].at, prompt[in_prompt[-1].at :]
        if self.text.startswith(tail, before):
            return before + len(tail)
        # a prompt may end in text that only prompts have, such as <think>: use the part that precedes any answer here
        shared = self._whole_controls(_common_prefix(tail, self.text[before : own[0].at]), tail)
        other = self._with_letter(turn)
        header = [mark.at for mark in other.marks_of(turn)[:1]]
        begun = [mark.at for mark in other.marks_of(turn - 1) if mark.at <= header[0]] if turn and header else [0]
        if not header or not begun:
            raise RowError(_ambiguous(turn))
        shared = min(shared, len(_common_prefix(tail, other.text[begun[-1] : header[0]])))
        if not tail[:shared].strip():
            raise RowError(_ambiguous(turn))
        return before + shared

    def _first_header(self, turn: int) -> int:
        """The start of message 0, for a template that cannot render a prompt without an earlier message."""
        prompt, marks = (
            self._render_marked([{"role": "user", "content": "x"}], {0: BOTH}, prompt=True) if not turn else ("", [])
        )
        other = self._with_letter(turn)
        header = other.text[: other.marks_of(turn)[0].at] if marks and other.marks_of(turn) else ""
        tail = prompt[marks[-1].at :] if marks else ""
        if not _common_prefix(header[::-1], tail[::-1]).strip() or not self.text.startswith(header):
            raise RowError(_ambiguous(turn))
        return len(header)

    def _check_prompt(self, turn: int, prompt: str) -> None:
        """Raise RowError if the template ignores add_generation_prompt but writes a header before answers."""
        if self._render(self.messages[:turn], False) != prompt:
            return
        probe = [*self.messages[:turn], {"role": "assistant", "content": "x"}]
        text, marks = self._render_marked(probe, {turn: BOTH})
        if not marks or text[len(prompt) : marks[0].at].strip():
            raise RowError(
                f"message {turn + 1}: the template writes a header before the assistant's text but ignores "
                f"add_generation_prompt, so the start of the text is unknown"
            )

    def _stop(self, turn: int, last: Mark) -> int:
        """The end of message `turn`: after its closing control token, else after the text the template ends it with."""
        messages = self.messages[: turn + 1]
        if turn + 1 < len(self.messages):
            ended, continued = self._text_after(messages, last), self.text[last.at :]
        else:
            ended = self.text[last.at :]
            try:
                continued = self._text_after([*messages, {"role": "user", "content": "x"}], last)
            except RowError:
                continued = ended
        shared = self._whole_controls(_common_prefix(ended, continued), ended)
        shared = min(shared, self._whole_controls(ended[:shared], continued))
        stop = self._last_control(ended[:shared])
        if not stop and turn + 1 == len(self.messages):  # some templates write an end only after the last message
            stop = self._last_control(ended)
        return last.at + (stop or shared)

    def _text_after(self, messages: Sequence[Message], mark: Mark) -> str:
        """The text after a mark when other messages are rendered."""
        text, marks = self._render_marked(messages, {mark.message: self._ends[mark.message]})
        places = [each.at for each in self._select(marks, mark.message) if each[:3] == mark[:3]]
        if not places or text != self._render(messages, False):
            raise RowError(_ambiguous(mark.message))
        return text[places[-1] :]

    def _last_control(self, text: str) -> int:
        """The end of the last control string in `text`, or 0."""
        return max((match.end() for match in self._find_controls(text)), default=0)

    def _whole_controls(self, prefix: str, text: str) -> int:
        """The length of `prefix`, a prefix of `text`, shortened so that it does not cut a control string of `text`."""
        cut = [match.start() for match in self._find_controls(text) if match.start() < len(prefix) < match.end()]
        return cut[0] if cut else len(prefix)

    def _find_controls(self, text: str) -> Iterator[re.Match[str]]:
        return self._controls.finditer(text) if self._controls else iter(())


def _common_prefix(one: str, other: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:count]


def _ambiguous(turn: int) -> str:
    return (
        f"message {turn + 1}: the assistant's text cannot be located, because the template renders the messages up to "
        f"it differently when others follow"
    )
