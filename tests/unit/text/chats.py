"""Tokenizers, conversations and templates that several tests of this folder share."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from assets import asset

from megalite.text.chat import ChatTemplate, find_template
from megalite.text.conversations import normalise
from megalite.text.masks import token_weights, weighted_spans
from megalite.text.tokenizer import Encoding, Tokenizer, load_tokenizer

GOLDEN = Path(__file__).with_name("golden")
TOKENIZERS = {"smollm2": "smollm2", "deepseek": "deepseek/tokenizer.json", "mistral-v3": "mistral-v3/tokenizer.model"}
# texts that every lossless tokenizer returns unchanged
TEXTS = ["In the beginning", "", "  two  spaces\n\n a new line\t", "床前明月光，疑是地上霜。\n", "naïve 😀 mix 山"]
ROWS: dict[str, Any] = json.loads((GOLDEN / "conversations.json").read_text("utf-8"))


@cache
def tokenizer(which: str) -> Tokenizer:
    return load_tokenizer(asset(TOKENIZERS[which]))


def template(name: str | None, which: str) -> ChatTemplate:
    return ChatTemplate(*find_template(name, tokenizer(which)), tokenizer(which))


def made(row: Any, chat: ChatTemplate, which: str, train_on: str = "assistant") -> tuple[str, Encoding, list[float]]:
    conversation = normalise(row)
    rendered = chat.render(conversation)
    encoding = tokenizer(which).encode_chat(rendered.text)
    spans = weighted_spans(conversation, rendered, train_on)
    return rendered.text, encoding, token_weights(rendered.text, encoding, spans).tolist()


def trained_text(row: Any, chat: ChatTemplate, which: str, train_on: str = "assistant") -> str:
    """The characters of all trained tokens; bytes of one character once."""
    text, encoding, weights = made(row, chat, which, train_on)
    return "".join(text[a:b] for a, b in sorted({span for span, weight in zip(encoding.spans, weights) if weight}))


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calling(*names: str, content: str = "") -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": {"x": 1}}} for name in names]
    return said(content, tool_calls=calls)


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def trained(source: str, messages: list[Any], train_on: str = "assistant", **row: Any) -> list[str]:
    found = normalise({"messages": messages, **row})
    rendered = ChatTemplate("mine", source, load_tokenizer(asset("smollm2"))).render(found)
    return [rendered.text[start:stop] for start, stop, _ in weighted_spans(found, rendered, train_on)]


E = "<|im_end|>"
HEAD = "<|im_start|>{{ m.role }}\n"
# reasoning is cut from every turn although the prompt opens it; calls concatenate text; results share one block
CUT = (
    "{% set ns = namespace(open=false) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<U>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ ('' if ns.open else '<R>') + '<r>' + m.content + '</r>' }}{% set ns.open = true %}"
    "{% else %}{{ '</R>' if ns.open else '<A>' }}{% set ns.open = false %}"
    "{{ m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}{{ '<c>' + c.function.name + '\n' + c.function.arguments + '</c>' }}{% endfor %}"
    "<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '</R>' if ns.open else '<A><think>\n' }}{% elif ns.open %}</R>{% endif %}"
)
# the header of a tool's result is the name of the call
QUOTING = (
    "{% set ns = namespace(name='') %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>{{ ns.name }}\n{{ m.content }}<|im_end|>{% else %}" + HEAD + "{{ m.content }}"
    "{% for c in (m.tool_calls or [])[:1] %}{% set ns.name = c.function.name %}{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
