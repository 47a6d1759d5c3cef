"""Chat templates: a conversation as one text, and which characters of it the assistant says.

Jinja in Hugging Face's dialect, in a sandbox. `{% generation %} ... {% endgeneration %}` surrounds what is trained; in
templates without it the assistant's turns are what a longer conversation adds to the prompt that a shorter one is.
"""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from megalite.data.controls import control_pattern as control_pattern
from megalite.data.conversations import CLOSE, OPEN, Conversation, Message, RowError
from megalite.data.tokenizer import Tokenizer

BUILT_IN = Path(__file__).parent / "templates"


class Span(NamedTuple):
    """Characters [start, stop) that message number `message` of the conversation makes the assistant say."""

    start: int
    stop: int
    message: int


@dataclass(frozen=True)
class Rendered:
    text: str
    spans: list[Span]


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
        environment = _environment()
        import jinja2

        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template {name}, line {error.lineno}: {error.message}") from None
        self.marked = bool(re.search(r"\{%-?\s*generation\b", source))
        # a built-in template takes a token that the tokenizer has not for nothing; another fails, as in transformers
        missing = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "") if name in template_names() else {}
        self.tokens = missing | tokenizer.named
        self._controls = tokenizer.controls

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> str:
        """The text after which the assistant speaks."""
        return self._render(messages, tools, prompt=True).replace(OPEN, "").replace(CLOSE, "")

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as one text, with the spans of the assistant; RowError where they cannot be told."""
        messages, tools = conversation.messages, conversation.tools
        text = self._render(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not self.marked:
            return Rendered(text, [self._added(text, messages, tools, turn) for turn in turns])
        parts = re.split(f"([{OPEN}{CLOSE}])", text)
        spans, starts, position = [], list[int](), 0
        for part in parts:
            if part == OPEN:
                starts.append(position)
            elif part == CLOSE:
                spans.append((starts.pop(), position))
            else:
                position += len(part)
        if len(spans) != len(turns):
            raise RowError(
                f"template {self.name} marks {len(spans)} spans of generation, the assistant has {len(turns)} messages"
            )
        return Rendered(
            "".join(part for part in parts if part not in (OPEN, CLOSE)),
            [Span(start, stop, turn) for (start, stop), turn in zip(spans, turns)],
        )

    def _added(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None, turn: int) -> Span:
        """What message `turn` adds to the prompt before it, up to the control token that ends it."""
        remedy = f"mark them in template {self.name} with {{% generation %}} and {{% endgeneration %}}"
        prompt = self._render(messages[:turn], tools, prompt=True)
        after = self._render(messages[: turn + 1], tools)
        if not (text.startswith(after) and after.startswith(prompt)):
            raise RowError(
                f"message {turn + 1}: what the assistant says cannot be told from the rest, for the conversation up to "
                f"it is not how the whole one begins; {remedy}"
            )
        # a template that has no prompt of its own must come to the point at once
        if self._render(messages[:turn], tools) == prompt:
            said = messages[turn]["content"].lstrip()
            if not said or not after[len(prompt) :].lstrip().startswith(said[:1]):
                raise RowError(
                    f"message {turn + 1}: the template writes more before what the assistant says and does not know "
                    f"add_generation_prompt; {remedy}"
                )
        ended = after.rstrip()
        stop = len(ended) if any(ended.endswith(control) for control in self._controls) else len(after)
        return Span(len(prompt), stop, turn)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool = False) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=list(messages), tools=tools, documents=None, add_generation_prompt=prompt, **self.tokens
            )
        except jinja2.TemplateError as error:
            raise RowError(f"template {self.name}: {error.message or error}") from None
        except Exception as error:
            # whatever an expression of the template can raise over this row
            raise RowError(f"template {self.name} cannot render it: {error}") from None


def _environment() -> Any:
    """Jinja as Hugging Face configures it, and the generation tag."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.ext import loopcontrols as loops
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ValueError("chat templates need jinja2; pip install 'megalite[sft]'") from error

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as in the base class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return OPEN + caller() + CLOSE

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loops])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
