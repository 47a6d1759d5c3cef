"""Which characters of a rendered conversation the assistant says, where the template does not mark them.

The conversation is rendered once as it is and once with marks inside its messages. Where the second text without the
marks is the first, the marks say where in it each message stands; else nothing is concluded from them. A turn begins
where the prompt before it ends, and ends with the control token that the template writes behind it however the
conversation goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from megalite.text.messages import REASONING, Message, RowError, has_reasoning

START, STOP = "\ufdd4", "\ufdd5"
# what a mark stands in: CALL + i is the name of the i-th tool call of a message
CONTENT, THOUGHT, ARGUMENTS, CALL = range(4)
# two characters behind START or STOP say the number of a message and what of it
_FIRST = 0xF0000
_MARK = re.compile("[\ufdd4\ufdd5][\U000f0000-\U000ffffd]{2}")
BOTH = (True, True)

Render = Callable[[Sequence[Message], bool], str]


class Span(NamedTuple):
    """Characters [start, stop) that message number `message` makes the assistant say, or all of `since` to it."""

    start: int
    stop: int
    message: int
    since: int


class Mark(NamedTuple):
    """A mark as it was written, and the character of the text without marks before which it stands."""

    start: bool
    kind: int
    message: int
    at: int


class Turns:
    """The messages of one conversation in `text`, as `render` gives it of them.

    `render` takes messages and whether a prompt follows. `controls` finds the tokenizer's control strings.
    """

    def __init__(
        self, text: str, messages: Sequence[Message], render: Render, controls: re.Pattern[str] | None
    ) -> None:
        self.text, self.messages, self._render, self._controls = text, messages, render, controls
        # equal messages get equal marks: some templates look for the last message of the user by comparing
        self._number = [
            index if message["role"] == "assistant" else messages.index(message)
            for index, message in enumerate(messages)
        ]
        self._ends: dict[int, tuple[bool, bool]] = {}

    @cached_property
    def marks(self) -> list[Mark]:
        """The marks that can be trusted, in the order of the text."""
        numbers = sorted(set(self._number))
        if (found := self._try(dict.fromkeys(numbers, BOTH))) is not None:
            self._ends = dict.fromkeys(numbers, BOTH)
            return found
        # a template that looks into a message: mark each alone, at both ends or at one
        marks = []
        for number in numbers:
            for ends in (BOTH, (False, True), (True, False)):
                if (found := self._try({number: ends})) is not None:
                    self._ends[number] = ends
                    marks += found
                    break
        return sorted(marks, key=lambda mark: mark.at)

    def of(self, index: int) -> list[Mark]:
        """The marks of one message, where it stands and not where a later one quotes it."""
        return self._own(self.marks, index)

    def _own(self, marks: Sequence[Mark], index: int) -> list[Mark]:
        own = [mark for mark in marks if mark.message == self._number[index]]
        if self.messages[index]["role"] != "assistant":
            return own
        return sorted({mark[:3]: mark for mark in reversed(own)}.values(), key=lambda mark: mark.at)

    def answers_in(self, start: int, stop: int) -> list[int]:
        """The messages of the assistant that characters [start, stop) are part of."""
        inside = [mark for mark in self.marks if (start <= mark.at < stop if mark.start else start < mark.at <= stop)]
        if inside:
            return sorted({mark.message for mark in inside if self._speaks(mark)})
        before = [mark for mark in self.marks if mark.at <= start][-1:]
        behind = [mark for mark in self.marks if mark.at >= stop][:1]
        first = before[0].message + 1 if before else 0
        last = behind[0].message if behind else len(self.messages)
        for index in range(first, last):  # one without text of its own
            if self.messages[index]["role"] == "assistant" and not self.of(index):
                return [index]
        return [mark.message for mark in before + behind if self._speaks(mark)][:1]

    def _speaks(self, mark: Mark) -> bool:
        return bool(self.messages[mark.message]["role"] == "assistant")

    def can_mark(self, index: int) -> bool:
        """Whether marks inside a message leave the rest of the text as it is."""
        _ = self.marks
        return self._number[index] in self._ends

    def _try(self, ends: Mapping[int, tuple[bool, bool]]) -> list[Mark] | None:
        try:
            text, marks = self._located(self.messages, ends)
        except RowError:
            return None
        return marks if text == self.text else None

    def _located(
        self, messages: Sequence[Message], ends: Mapping[int, tuple[bool, bool]], prompt: bool = False
    ) -> tuple[str, list[Mark]]:
        """The text of messages that were rendered with marks, and the marks."""
        numbers = self._number + list(range(len(self._number), len(messages)))
        marked = [
            with_marks(message, number, ends[number]) if number in ends else message
            for message, number in zip(messages, numbers)
        ]
        return split_marks(self._render(marked, prompt))

    def span(self, turn: int) -> Span:
        """What message `turn` of the assistant says; RowError where that is not certain."""
        own = self.of(turn)
        if not own:
            return self._empty(turn)
        start = self._start(turn, own)
        stop = self._stop(turn, own[-1])
        others = (mark for mark in self.marks if mark.message != self._number[turn])
        if stop < start or any(start <= mark.at < stop for mark in others):
            raise RowError(f"message {turn + 1}: the text of another message stands inside what the assistant says")
        return Span(start, stop, turn, turn)

    def _with_word(self, turn: int) -> Turns:
        """The same conversation in which message `turn` says one letter and nothing else."""
        word = {"role": "assistant", "content": "x"}
        messages = [*self.messages[:turn], word, *self.messages[turn + 1 :]]
        return Turns(self._render(messages, False), messages, self._render, self._controls)

    def _empty(self, turn: int) -> Span:
        """A message without any text of its own is one of a letter, less the letter."""
        other = self._with_word(turn)
        if not other.of(turn):
            raise RowError(_unsure(turn))
        span, at = other.span(turn), other.of(turn)[0].at
        if other.text[:at] + other.text[at + 1 :] != self.text:
            raise RowError(_unsure(turn))
        return Span(span.start, span.stop - 1, turn, turn)

    def _start(self, turn: int, own: Sequence[Mark]) -> int:
        """Where the prompt ends that asks for message `turn`."""
        try:
            prompt = self._render(self.messages[:turn], True)
        except RowError:
            return self._first_header(turn)
        if self.text.startswith(prompt):
            self._check_prompt(turn, prompt)
            return len(prompt)
        # what comes before is written otherwise in the prompt: compare from the end of the last message before on
        before, tail = 0, prompt
        if turn:
            asked, marks = self._located(self.messages[:turn], self._ends, prompt=True)
            there = [mark for mark in marks if mark.message == self._number[turn - 1]]
            here = [mark for mark in self.of(turn - 1) if mark.at <= own[0].at]
            if asked != prompt or not there or not here or there[-1][:3] != here[-1][:3]:
                raise RowError(_unsure(turn))
            before, tail = here[-1].at, prompt[there[-1].at :]
        if self.text.startswith(tail, before):
            return before + len(tail)
        # a prompt may end in what is written behind it only, as <think>: take what stands before any answer here
        shared = self._whole(_common(tail, self.text[before : own[0].at]), tail)
        other = self._with_word(turn)
        header = [mark.at for mark in other.of(turn)[:1]]
        begun = [mark.at for mark in other.of(turn - 1) if mark.at <= header[0]] if turn and header else [0]
        if not header or not begun:
            raise RowError(_unsure(turn))
        shared = min(shared, len(_common(tail, other.text[begun[-1] : header[0]])))
        if not tail[:shared].strip():
            raise RowError(_unsure(turn))
        return before + shared

    def _first_header(self, turn: int) -> int:
        """Where message 0 begins, of a template that renders no prompt without a message before it."""
        asked, marks = (
            self._located([{"role": "user", "content": "x"}], {0: BOTH}, prompt=True) if not turn else ("", [])
        )
        other = self._with_word(turn)
        header = other.text[: other.of(turn)[0].at] if marks and other.of(turn) else ""
        tail = asked[marks[-1].at :] if marks else ""
        if not _common(header[::-1], tail[::-1]).strip() or not self.text.startswith(header):
            raise RowError(_unsure(turn))
        return len(header)

    def _check_prompt(self, turn: int, prompt: str) -> None:
        """A template that has no prompt of its own must come to the point at once."""
        if self._render(self.messages[:turn], False) != prompt:
            return
        probe = [*self.messages[:turn], {"role": "assistant", "content": "x"}]
        text, marks = self._located(probe, {turn: BOTH})
        if not marks or text[len(prompt) : marks[0].at].strip():
            raise RowError(
                f"message {turn + 1}: the template writes more before what the assistant says and does not know "
                f"add_generation_prompt"
            )

    def _stop(self, turn: int, last: Mark) -> int:
        """Behind the control token that ends message `turn`, else behind what is written as its end."""
        messages = self.messages[: turn + 1]
        if turn + 1 < len(self.messages):
            ended, going_on = self._behind(messages, last), self.text[last.at :]
        else:
            ended = self.text[last.at :]
            try:
                going_on = self._behind([*messages, {"role": "user", "content": "x"}], last)
            except RowError:
                going_on = ended
        shared = self._whole(_common(ended, going_on), ended)
        shared = min(shared, self._whole(ended[:shared], going_on))
        stop = self._controlled(ended[:shared])
        if not stop and turn + 1 == len(self.messages):  # some templates write an end behind the whole text alone
            stop = self._controlled(ended)
        return last.at + (stop or shared)

    def _behind(self, messages: Sequence[Message], mark: Mark) -> str:
        """What stands behind a mark in the text of other messages."""
        text, marks = self._located(messages, {mark.message: self._ends[mark.message]})
        there = [each.at for each in self._own(marks, mark.message) if each[:3] == mark[:3]]
        if not there or text != self._render(messages, False):
            raise RowError(_unsure(mark.message))
        return text[there[-1] :]

    def _controlled(self, text: str) -> int:
        """The length of `text` up to its last control token, 0 where it has none."""
        return max((match.end() for match in self._tokens(text)), default=0)

    def _whole(self, shared: str, text: str) -> int:
        """The length of the beginning of `text`, without a control string that it holds only the first part of."""
        cut = [match.start() for match in self._tokens(text) if match.start() < len(shared) < match.end()]
        return cut[0] if cut else len(shared)

    def _tokens(self, text: str) -> Iterator[re.Match[str]]:
        return self._controls.finditer(text) if self._controls else iter(())


def _common(one: str, other: str) -> str:
    """How both begin."""
    count = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:count]


def _unsure(turn: int) -> str:
    return (
        f"message {turn + 1}: what the assistant says cannot be told from the rest, for the conversation up to it is "
        f"not how the whole one begins"
    )


def with_marks(message: Message, number: int, ends: tuple[bool, bool] = BOTH) -> Message:
    """A message with marks inside its texts, where no template's trimming reaches them."""
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
    said = (text or "").strip()
    if not said:
        return text
    first = text.index(said)
    start, stop = (mark_of(sign, number, kind) * wanted for sign, wanted in zip((START, STOP), ends))
    return text[:first] + start + said + stop + text[first + len(said) :]


def mark_of(sign: str, number: int, kind: int) -> str:
    return sign + chr(_FIRST + number) + chr(_FIRST + kind)


def split_marks(text: str) -> tuple[str, list[Mark]]:
    """The text without marks, and these."""
    parts, marks, at, done = [], [], 0, 0
    for match in _MARK.finditer(text):
        parts.append(text[done : match.start()])
        at += match.start() - done
        done = match.end()
        number, kind = (ord(each) - _FIRST for each in match[0][1:])
        marks.append(Mark(match[0][0] == START, kind, number, at))
    return "".join(parts) + text[done:], marks
