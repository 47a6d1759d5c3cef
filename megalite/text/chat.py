"""Chat templates: a conversation as one text, and which characters of it the assistant says.

`{% generation %} ... {% endgeneration %}` surrounds what is trained; in templates without it the turns of the assistant
are found in the rendered text.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.text.controls import control_pattern as control_pattern
from megalite.text.jinja import CLOSE, OPEN, LimitError, Template
from megalite.text.messages import Conversation, Message, RowError
from megalite.text.shown import check_calls, check_contents, hidden_reasoning
from megalite.text.spans import Span, Turns
from megalite.text.tokenizer import Tokenizer

BUILT_IN = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Rendered:
    """`spans`: what the assistant says, in order. `refused`: messages whose span is not known, and why.

    `changed`: messages of the assistant that the text does not show as they are, and why. `unshown`: how many messages
    have reasoning that it does not show.
    """

    text: str
    spans: list[Span]
    refused: dict[int, str] = field(default_factory=dict)
    changed: dict[int, str] = field(default_factory=dict)
    unshown: int = 0


def template_names() -> list[str]:
    return sorted(path.stem for path in BUILT_IN.glob("*.jinja"))


def find_template(name: str | None, tokenizer: Tokenizer) -> tuple[str, str]:
    """(name, source) of a built-in template, a .jinja file, or with None the tokenizer's own."""
    if name is not None:
        if name in template_names():
            return name, (BUILT_IN / f"{name}.jinja").read_text("utf-8")
        if not Path(name).is_file():
            near = difflib.get_close_matches(name, template_names(), n=1)
            raise ValueError(
                f"no chat template {name}: name a .jinja file or one of {', '.join(template_names())}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        return Path(name).name, Path(name).read_text("utf-8")
    if tokenizer.templates:
        own = tokenizer.template_file
        return own if own.endswith(".jinja") else f"chat_template of {own}", _by_tools(tokenizer.templates)
    raise ValueError(
        f"{tokenizer.path} has no chat template beside it (chat_template.jinja, or chat_template in "
        f"tokenizer_config.json); with --template or data.template name a .jinja file or one of "
        f"{', '.join(template_names())}"
    )


def _by_tools(named: Mapping[str, str]) -> str:
    """Named templates as one: where there are tools that of the name tool_use, as transformers chooses."""
    # jinja drops a last newline, the newline behind a block and spaces before one; an expression is no block
    none = f"{{{{ raise_exception('there are chat templates {', '.join(named)}, none called default') }}}}"
    usual = named.get("default", none)
    if "tool_use" not in named:
        return usual
    parts = ["{% if tools is not none %}", named["tool_use"], "{% else %}", usual, "{% endif %}"]
    return "{{ '' }}".join(part.removesuffix("\n") for part in parts)


class ChatTemplate:
    """A compiled template. ValueError with the line where it is no valid Jinja."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer) -> None:
        self.name, self.source = name, source
        self._template = Template(name, source)
        # a built-in template takes a token that the tokenizer has not for nothing; another fails, as in transformers
        missing = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "") if name in template_names() else {}
        self.tokens = missing | tokenizer.named
        longest_first = sorted(tokenizer.controls, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The text after which the assistant speaks."""
        return self._render(messages, tools, datetime.datetime.now(), prompt=True)

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as one text, with the spans of the assistant; RowError where it cannot show the row."""
        refused = None
        for messages in _forms(conversation.messages):
            try:
                return self._rendered(messages, conversation.tools)
            except RowError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Rendered:
        # one time of day for all renderings of a row
        now = datetime.datetime.now()

        def render(some: Sequence[Message], prompt: bool) -> str:
            return self._render(some, tools, now, prompt)

        text = render(messages, False)
        turns = Turns(text, messages, render, self._controls)
        check_calls(turns, render, self.name)
        changed = check_contents(turns, self.name)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        unshown = hidden_reasoning(turns)
        if self._template.marked:
            marked = self._render(messages, tools, now, marks=True)
            spans = self._marked_spans(marked, turns, answers)
            nothing = f"template {self.name} marks nothing of this conversation as generation"
            return Rendered(text, spans, {} if spans else {answers[-1]: nothing}, changed, unshown)
        spans, refused = [], {}
        for answer in answers:
            try:
                spans.append(turns.span(answer))
            except RowError as error:
                remedy = "mark what is trained with {% generation %} and {% endgeneration %}"
                refused[answer] = f"{error}; {remedy} in template {self.name}"
        return Rendered(text, spans, refused, changed, unshown)

    def _marked_spans(self, marked: str, turns: Turns, answers: Sequence[int]) -> list[Span]:
        """The generation blocks of a text, each with the messages it makes the assistant say."""
        blocks, opened, position = list[tuple[int, int]](), list[int](), 0
        parts = re.split(f"([{OPEN}{CLOSE}])", marked)
        for part in parts:
            if part == OPEN:
                opened.append(position)
            elif part != CLOSE:
                position += len(part)
            elif (start := opened.pop()) < position and not opened:  # blocks inside a block are part of it
                blocks.append((start, position))
        if "".join(part for part in parts if part not in (OPEN, CLOSE)) != turns.text:
            raise RowError(f"template {self.name} works on the text of its generation blocks; mark what it writes last")
        if len(blocks) == len(answers) and not all(turns.of(answer) for answer in answers):
            return [Span(*block, answer, answer) for block, answer in zip(blocks, answers)]
        spans = []
        for start, stop in blocks:
            inside = turns.answers_in(start, stop)
            if not inside:
                raise RowError(f"template {self.name} marks as generation what no message of the assistant says")
            spans.append(Span(start, stop, inside[-1], inside[0]))
        return spans

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        now: datetime.datetime,
        prompt: bool = False,
        marks: bool = False,
    ) -> str:
        import jinja2

        try:
            return self._template.render(
                now,
                marks,
                (len(messages), sum(len(message["content"] or "") for message in messages)),
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokens,
            )
        except LimitError:
            raise
        except jinja2.TemplateError as error:
            raise RowError(f"template {self.name}: {error.message or error}") from None
        except Exception as error:
            # whatever an expression of the template can raise over this row
            raise RowError(f"template {self.name} cannot render it: {str(error) or type(error).__name__}") from None


def turn_ends(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """The control token that the template writes behind what the assistant says; none where it writes none."""
    said = "Assistant said this"
    roles = ("user", "assistant", "user")
    text = template.prompt([{"role": r, "content": said if r == "assistant" else "Go on"} for r in roles])
    after = tokenizer.encode_chat(text[text.rindex(said) + len(said) :]).ids
    controls = set(tokenizer.controls.values())
    return frozenset(next(([token] for token in after if token in controls), []))


class _Arguments(dict[str, Any]):
    """The arguments of a tool call: a template that writes them without `tojson` wants them as JSON."""

    def __str__(self) -> str:
        raise TypeError("the arguments of a tool call are no text")


def _forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The ways to write tool calls that templates expect: arguments an object or JSON, no content empty or null."""
    if not any(message.get("tool_calls") for message in messages):
        yield messages
        return
    for empty in ("", None):
        for as_text in (False, True):
            yield [_form(message, as_text, empty) if message.get("tool_calls") else message for message in messages]


def _form(message: Message, as_text: bool, empty: str | None) -> Message:
    calls = [_call_form(call, as_text) for call in message["tool_calls"]]
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


def _call_form(call: Message, as_text: bool) -> Message:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_form(call["function"], as_text)}
    found = call["arguments"]
    return {**call, "arguments": json.dumps(found, ensure_ascii=False) if as_text else _Arguments(found)}
