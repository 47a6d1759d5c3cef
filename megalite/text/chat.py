"""Chat templates: renders a conversation as one text and finds the characters that the assistant writes.

In a template, `{% generation %} ... {% endgeneration %}` surrounds the trained text. If a template has no such tags,
`megalite.text.spans` locates the assistant's turns in the rendered text.
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

from megalite.text.jinja import CLOSE, OPEN, LimitError, Template
from megalite.text.messages import Conversation, Message, RowError
from megalite.text.shown import check_calls, check_contents, hidden_reasoning
from megalite.text.spans import Span, Turns
from megalite.text.tokenizer import Tokenizer

BUILT_IN = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    `spans`: the assistant's characters, in order. `refused`: reasons by number of the assistant's messages without a
    known span. `changed`: reasons by number of the assistant's messages that the text drops or changes. `unshown`: how
    many messages have reasoning that the text does not show.
    """

    text: str
    spans: list[Span]
    refused: dict[int, str] = field(default_factory=dict)
    changed: dict[int, str] = field(default_factory=dict)
    unshown: int = 0


def template_names() -> list[str]:
    """The names of the built-in templates."""
    return sorted(path.stem for path in BUILT_IN.glob("*.jinja"))


def find_template(name: str | None, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return (name, source) of a built-in template, of a .jinja file, or, if `name` is None, of the tokenizer's own.

    Raises ValueError if there is no such template.
    """
    if name is not None:
        if name in template_names():
            return name, (BUILT_IN / f"{name}.jinja").read_text("utf-8")
        if not Path(name).is_file():
            near = difflib.get_close_matches(name, template_names(), n=1)
            raise ValueError(
                f"no chat template {name}: use a .jinja file or one of {', '.join(template_names())}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        return Path(name).name, Path(name).read_text("utf-8")
    if tokenizer.templates:
        own = tokenizer.template_file
        return own if own.endswith(".jinja") else f"chat_template of {own}", _select_by_tools(tokenizer.templates)
    raise ValueError(
        f"{tokenizer.path} has no chat template next to it (chat_template.jinja, or chat_template in "
        f"tokenizer_config.json); set --template or data.template to a .jinja file or one of "
        f"{', '.join(template_names())}"
    )


def _select_by_tools(named: Mapping[str, str]) -> str:
    """Join named templates: rows with tools use `tool_use`, others `default`, as transformers chooses."""
    # jinja strips a final newline, and whitespace around a block but not around an expression
    missing = f"{{{{ raise_exception('there are chat templates {', '.join(named)}, none called default') }}}}"
    default = named.get("default", missing)
    if "tool_use" not in named:
        return default
    parts = ["{% if tools is not none %}", named["tool_use"], "{% else %}", default, "{% endif %}"]
    return "{{ '' }}".join(part.removesuffix("\n") for part in parts)


class ChatTemplate:
    """A compiled template. Raises ValueError with the line number if it is not valid Jinja."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer) -> None:
        self.name, self.source = name, source
        self._template = Template(name, source)
        # built-in templates render a token that the tokenizer lacks as ""; others fail, as in transformers
        missing = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "") if name in template_names() else {}
        self.tokens = missing | tokenizer.named
        longest_first = sorted(tokenizer.controls, key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """Render messages as the prompt for the assistant's next message. Raises RowError if that fails."""
        return self._render(messages, tools, datetime.datetime.now(), prompt=True)

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation as one text with the assistant's spans.

        Raises RowError if the template fails on this row or does not show all of it, LimitError if it loops.
        """
        refused = None
        for messages in _forms(conversation.messages):
            try:
                return self._render_checked(messages, conversation.tools)
            except RowError as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _render_checked(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> Rendered:
        # strftime_now must return the same time in all renderings of a row
        now = datetime.datetime.now()

        def render(part: Sequence[Message], prompt: bool) -> str:
            return self._render(part, tools, now, prompt)

        text = render(messages, False)
        turns = Turns(text, messages, render, self._controls)
        check_calls(turns, render, self.name)
        changed = check_contents(turns, self.name)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        unshown = hidden_reasoning(turns)
        if self._template.marked:
            marked = self._render(messages, tools, now, marks=True)
            spans = self._marked_spans(marked, turns, answers)
            unmarked = f"template {self.name} writes no generation block for this conversation"
            return Rendered(text, spans, {} if spans else {answers[-1]: unmarked}, changed, unshown)
        spans, refused = [], {}
        for answer in answers:
            try:
                spans.append(turns.span(answer))
            except RowError as error:
                remedy = "put {% generation %} and {% endgeneration %} around the trained text"
                refused[answer] = f"{error}; {remedy} in template {self.name}"
        return Rendered(text, spans, refused, changed, unshown)

    def _marked_spans(self, marked: str, turns: Turns, answers: Sequence[int]) -> list[Span]:
        """The generation blocks of a text, each with the assistant's messages that it contains."""
        blocks, opened, position = list[tuple[int, int]](), list[int](), 0
        parts = re.split(f"([{OPEN}{CLOSE}])", marked)
        for part in parts:
            if part == OPEN:
                opened.append(position)
            elif part != CLOSE:
                position += len(part)
            elif (start := opened.pop()) < position and not opened:  # a nested block is part of the outer one
                blocks.append((start, position))
        if "".join(part for part in parts if part not in (OPEN, CLOSE)) != turns.text:
            raise RowError(
                f"template {self.name} modifies the text of its generation blocks; put the tags around its final output"
            )
        if len(blocks) == len(answers) and not all(turns.marks_of(answer) for answer in answers):
            return [Span(*block, answer, answer) for block, answer in zip(blocks, answers)]
        spans = []
        for start, stop in blocks:
            inside = turns.answers_in(start, stop)
            if not inside:
                raise RowError(f"template {self.name} has a generation block around text that is not the assistant's")
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
            # expressions in a template can raise anything
            raise RowError(f"template {self.name} cannot render it: {str(error) or type(error).__name__}") from None


def turn_ends(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the control token that the template writes after an assistant's message, or an empty set."""
    answer = "Assistant said this"
    roles = ("user", "assistant", "user")
    text = template.prompt([{"role": r, "content": answer if r == "assistant" else "Go on"} for r in roles])
    after = tokenizer.encode_chat(text[text.rindex(answer) + len(answer) :]).ids
    controls = set(tokenizer.controls.values())
    return frozenset(next(([token] for token in after if token in controls), []))


class _Arguments(dict[str, Any]):
    """Tool call arguments that refuse `str`: a template that omits `tojson` expects JSON text instead of an object."""

    def __str__(self) -> str:
        raise TypeError("the arguments of a tool call are an object, not text")


def _forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """The forms of tool calls that templates expect: arguments as object or as JSON, missing content as "" or null."""
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
    arguments = call["arguments"]
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False) if as_text else _Arguments(arguments)}
