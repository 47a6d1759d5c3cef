"""Random chat templates on random conversations: as transformers renders, tokenises and masks them, or refused by name.

A template is drawn from what real ones do. Each draw also says in Python what the assistant should be trained to say,
which is compared with the spans that are found in templates without marks.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import pytest
from assets import asset
from campaign import rounds

from megalite.text.chat import ChatTemplate
from megalite.text.conversations import normalise
from megalite.text.masks import token_weights, weighted_spans
from megalite.text.messages import Conversation, RowError
from megalite.text.tokenizer import Tokenizer, load_tokenizer

END, FINAL = "<|im_end|>", "<|endoftext|>"
HEADERS = {
    "chatml": ("'<|im_start|>' + role + '\\n'", "<|im_end|>", "\\n"),
    "short": ("'<|im_start|>' + role + ': '", "<|im_end|>", ""),
    "words": ("'### ' + role | capitalize + ':\\n'", "<|im_end|>", "\\n\\n"),
    "bare": ("role + '>'", "<|endoftext|>", ""),
}


class Draw(NamedTuple):
    """The features of one template."""

    header: str
    ends: str  # each turn | the text | both
    trim: str
    system: str
    thinking: str  # none | cut | field | last
    prompt: str  # plain | think
    calls: str  # none | json | text
    mark: str  # none | body | header | pieces | macro | closing | whole

    @staticmethod
    def of(draw: random.Random) -> Draw:
        return Draw(
            draw.choice(list(HEADERS)),
            draw.choice(["turn", "turn", "text", "both"]),
            draw.choice(["", "", " | trim", ".strip('\\n')"]),
            draw.choice(["turn", "turn", "first", "last", "default", "refused"]),
            draw.choice(["none", "cut", "field", "last"]),
            draw.choice(["plain", "plain", "think"]),
            draw.choice(["none", "json", "json", "text"]),
            draw.choice(["none", "none", "none", "body", "header", "pieces", "macro", "closing", "whole"]),
        )

    def block(self, name: str, source: str) -> str:
        return f"{{% generation %}}{source}{{% endgeneration %}}" if self.mark == name else source

    def source(self) -> str:
        header, end, gap = HEADERS[self.header]
        closing = f"{{{{ '{end}' }}}}" if self.ends != "text" else ""
        thought = "{{ thought }}"
        if self.thinking in ("field", "last"):
            always = " or loop.last" if self.thinking == "last" else ""
            thought = f"{{% if thought{always} %}}{{{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}}}{{% endif %}}"
            if self.thinking == "last":
                thought = f"{{% if loop.index0 > ns.last %}}{thought}{{% endif %}}"
        calls = ""
        if self.calls != "none":
            arguments = "f.arguments | tojson" if self.calls == "json" else "f.arguments"
            calls = (
                "{% for c in m.tool_calls or [] %}{% set f = c.function %}{{ '<tool>' + f.name + ' ' + "
                + arguments
                + " + '</tool>' }}{% endfor %}"
            )
        said = f"{{{{ content{self.trim} }}}}"
        if self.mark == "pieces":
            body = "".join(self.block("pieces", piece) for piece in (thought, said, calls, closing) if piece)
        elif self.mark == "macro":
            body = f"{thought}{{{{ say(content) }}}}{calls}{closing}"
        else:
            body = thought + said + calls + closing
        body = self.block("body", body) if self.mark != "closing" else self._closing(body)
        answer = self.block("header", f"{{{{ {header} }}}}{body}")
        split = ""
        if self.thinking == "cut":
            split = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        elif self.thinking != "none":
            split = (
                "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content.strip('\\n') %}"
                "{% elif '</think>' in content %}"
                "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
                "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
            )
        systems = {
            "turn": ("", ""),
            "default": ("{% if messages[0].role != 'system' %}{{ 'Be good.\\n' }}{% endif %}", ""),
            "refused": ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}", ""),
            "first": ("", "first.index == loop.index0"),
            "last": ("", "ns.last == loop.index0"),
        }
        before, place = systems[self.system]
        put = f"{{% if {place} and system %}}{{{{ system + '\\n\\n' }}}}{{% endif %}}" if place else ""
        skip = "m.role == 'system' and loop.first" if place else "false"
        after = f"{{{{ '{FINAL}' }}}}" if self.ends != "turn" else ""
        return "".join(
            (
                "{% macro say(text) %}" + self.block("macro", f"{{{{ text{self.trim} }}}}") + "{% endmacro %}",
                "{% set system = messages[0].content if messages and messages[0].role == 'system' else '' %}",
                "{% set ns = namespace(last=-1) %}{% set first = namespace(index=-1) %}",
                "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}",
                "{% if first.index < 0 %}{% set first.index = loop.index0 %}{% endif %}{% endif %}{% endfor %}",
                before,
                "{% generation %}" if self.mark == "whole" else "",
                "{% for m in messages %}{% set role = m.role %}{% set content = m.content %}{% set thought = '' %}",
                f"{{% if {skip} %}}{{% elif role == 'assistant' %}}{split}{answer}{{{{ '{gap}' }}}}",
                f"{{% else %}}{{{{ {header} }}}}{put}{{{{ content{self.trim} }}}}{closing}{{{{ '{gap}' }}}}",
                "{% endif %}",
                "{% endfor %}",
                "{% endgeneration %}" if self.mark == "whole" else "",
                f"{{% if add_generation_prompt %}}{{% set role = 'assistant' %}}{{{{ {header} }}}}",
                "{{ '<think>\\n' }}" if self.prompt == "think" else "",
                f"{{% else %}}{self.block('closing', after) if self.mark == 'closing' else after}{{% endif %}}",
            )
        )

    def _closing(self, body: str) -> str:
        return f"{{% generation %}}{body}{{% endgeneration %}}"

    def said(self, messages: list[Any]) -> list[str]:
        """What the assistant is trained to say, white space at the ends aside."""
        trim = {"": str, " | trim": str.strip, ".strip('\\n')": lambda text: text.strip("\n")}[self.trim]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        said = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            content, thought = message["content"] or "", ""
            if self.thinking == "cut":
                content = content.split("</think>")[-1]
            elif self.thinking != "none":
                if "reasoning_content" in message:
                    thought = message["reasoning_content"].strip("\n")
                elif "</think>" in content:
                    thought = content.split("</think>")[0].split("<think>")[-1].strip("\n")
                    content = content.split("</think>")[-1].lstrip("\n")
                shown = self.thinking == "field" or i > last
                always = self.thinking == "last" and i == len(messages) - 1
                thought = f"<think>\n{thought}\n</think>\n\n" if shown and (thought or always) else ""
            text = thought + trim(content)
            for call in message.get("tool_calls", []):
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                text += f"<tool>{call['function']['name']} {arguments}</tool>"
            if self.ends != "text":
                text += HEADERS[self.header][1]
            elif i == len(messages) - 1:
                text += HEADERS[self.header][2].encode().decode("unicode_escape") + FINAL
            gap = HEADERS[self.header][2].encode().decode("unicode_escape")
            if self.prompt == "think" and (text + gap).startswith("<think>\n"):
                text = (text + gap).removeprefix("<think>\n")
            said.append(text.strip())
        return said


CONTENTS = [
    *("yes", "yes", "No.", "two\n\nlines", "  spaces  ", "\n\nlines around\n", "Zürich 🙂", "春晓", "<think>"),
    *("a{{ 1 }}b", "### User:", "user>", "[INST]", "</tool>", "x" * 50, "<tool>f {}</tool>", "{% if %}"),
    *('"quotes" \\n', "tab\t", "e\u0301"),
]
THOUGHTS = ["Hm.", "\nTwo\nlines.\n", "yes"]


def conversation(draw: random.Random) -> dict[str, Any]:
    messages: list[Any] = []
    if draw.random() < 0.3:
        messages.append({"role": "system", "content": draw.choice(CONTENTS)})
    if draw.random() < 0.05:
        messages.append({"role": "assistant", "content": draw.choice(CONTENTS)})
    for _ in range(draw.randrange(1, 4)):
        messages.append({"role": "user", "content": draw.choice(CONTENTS)})
        if draw.random() < 0.05:
            messages.append({"role": "user", "content": draw.choice(CONTENTS)})
        if draw.random() < 0.15:
            calls = [
                {"type": "function", "function": {"name": "f", "arguments": draw.choice([{"a": 1}, {"b": "é"}])}}
                for _ in range(draw.randrange(1, 3))
            ]
            content = draw.choice(["", None, "Let me see."])
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [{"role": "tool", "content": draw.choice(["9", '{"x": [1]}'])} for _ in calls]
        answer = {"role": "assistant", "content": draw.choice([*CONTENTS, ""])}
        if draw.random() < 0.3:
            thought = draw.choice(THOUGHTS)
            if draw.random() < 0.5:
                answer[draw.choice(["reasoning_content", "thinking", "reasoning"])] = thought
            else:
                answer["content"] = f"<think>{thought}</think>{answer['content']}"
        messages.append(answer)
    return {"messages": messages}


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(asset("smollm2"))


@cache
def theirs() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(asset("smollm2"))


def rendered_by_them(found: Conversation, source: str) -> list[tuple[str, list[int], list[int], set[int]]]:
    """Text, ids, mask and the borders of what is trained, of each way to write tool calls that the template takes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    ways = []
    for as_text in (False, True):
        messages = json.loads(json.dumps(found.messages))
        for call in (call["function"] for message in messages for call in message.get("tool_calls", [])):
            if as_text:
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        try:
            (text,), (blocks,) = render_jinja_template(
                [messages], chat_template=source, return_assistant_tokens_mask=True, **theirs().special_tokens_map
            )
            both = theirs().apply_chat_template(
                messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # whatever a template raises there
            continue
        ways.append((text, list(both["input_ids"]), list(both["assistant_masks"]), set(chain(*blocks))))
    return ways


def check(features: Draw, row: dict[str, Any]) -> str:
    """What became of a row: equal, or why it was refused."""
    source, found = features.source(), normalise(row)
    ways = rendered_by_them(found, source)
    chat = ChatTemplate("drawn", source, tokenizer())
    refused, rendered, spans = "", None, []
    try:
        rendered = chat.render(found)
        spans = weighted_spans(found, rendered, "assistant")
    except RowError as error:
        refused = str(error)
    if refused or rendered is None:
        known = [reason for reason in REFUSALS if reason in refused]
        assert known, refused
        return known[0]
    encoding = tokenizer().encode_chat(rendered.text)
    same = [way for way in ways if way[0] == rendered.text]
    assert same, (rendered.text, ways)
    _, ids, mask, borders = same[0]
    assert encoding.ids == ids
    texts = [rendered.text[start:stop] for start, stop, _ in spans]
    if features.mark == "none":
        assert [text.strip() for text in texts] == features.said(found.messages), rendered.text
        return "equal"
    weights = token_weights(rendered.text, encoding, spans).tolist()
    for weight, theirs_, (start, stop) in zip(weights, mask, encoding.spans):
        # a token on both sides of a border is not trained here; theirs leaves out bytes of a last character
        allowed = any(start < border < stop for border in borders) or (stop in borders and weight)
        assert bool(weight) == bool(theirs_) or allowed, (texts, source)
    return "equal"


REFUSALS = (
    "does not show its content",
    "does not show its tool calls",
    "no system",
    "cannot render it",
    "cannot be told from the rest",
    "marks as generation what",
    "marks nothing of this conversation",
    "works on the text of its generation blocks",
)


def test_random_templates() -> None:
    became = Counter[str]()
    drawn = rounds(10, 250)
    for seed in range(drawn):
        draw = random.Random(seed)
        features = Draw.of(draw)
        for _ in range(6):
            row = conversation(draw)
            try:
                became[check(features, row)] += 1
            except AssertionError as error:
                where = f"seed {seed}: {features}\n{json.dumps(row)}\n{features.source()}"
                raise AssertionError(f"{where}\n{error}") from None
    print(f"{drawn} templates, {sum(became.values())} rows: {dict(became.most_common())}")
    assert became["equal"] > 0.6 * sum(became.values())
