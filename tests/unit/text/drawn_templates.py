"""Random chat templates and conversations, and what the assistant should be trained to say in them."""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

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

    def answer(self, closing: str) -> str:
        """The part of the template that writes an assistant's message, including `closing`."""
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
        body = self.block("body", body) if self.mark != "closing" else self.block("closing", body)
        return self.split_thought() + self.block("header", f"{{{{ {HEADERS[self.header][0]} }}}}{body}")

    def split_thought(self) -> str:
        """The part of the template that separates an answer's reasoning from its content."""
        if self.thinking == "cut":
            return "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        if self.thinking == "none":
            return ""
        return (
            "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content.strip('\\n') %}"
            "{% elif '</think>' in content %}"
            "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
            "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        )

    def source(self) -> str:
        """The whole template."""
        header, end, gap = HEADERS[self.header]
        closing = f"{{{{ '{end}' }}}}" if self.ends != "text" else ""
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
                f"{{% if {skip} %}}{{% elif role == 'assistant' %}}{self.answer(closing)}{{{{ '{gap}' }}}}",
                f"{{% else %}}{{{{ {header} }}}}{put}{{{{ content{self.trim} }}}}{closing}{{{{ '{gap}' }}}}",
                "{% endif %}",
                "{% endfor %}",
                "{% endgeneration %}" if self.mark == "whole" else "",
                f"{{% if add_generation_prompt %}}{{% set role = 'assistant' %}}{{{{ {header} }}}}",
                "{{ '<think>\\n' }}" if self.prompt == "think" else "",
                f"{{% else %}}{self.block('closing', after) if self.mark == 'closing' else after}{{% endif %}}",
            )
        )

    def said(self, messages: list[Any]) -> list[str]:
        """The expected trained texts, without whitespace at the ends."""
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
