"""Rows that a template does not show completely are refused or reported."""

import json
from pathlib import Path
from typing import Any

import pytest
from assets import asset
from chats import CUT, HEAD, QUOTING, calling, result, said, trained, user

from megalite.data.instructions import Options, Report, examples
from megalite.text.chat import ChatTemplate
from megalite.text.messages import RowError
from megalite.text.tokenizer import load_tokenizer

SHORT = "{% for m in messages %}" + HEAD + "{{ m.content.upper() if m.content == 'shout' else m.content }}<|im_end|>\n"
SHORT += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SKIPPING = "{% for m in messages if m.content != 'skipped' %}" + SHORT.removeprefix("{% for m in messages %}")
BESIDE = SHORT.replace(
    "{{ m.content.upper()", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content.upper()"
)
BESIDE = BESIDE.replace("<|im_end|>\n", "{% endif %}<|im_end|>\n", 1)
NAMES = SHORT.replace(
    "<|im_end|>\n", "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>\n", 1
)


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (SHORT, [user("a"), calling("f"), result("9"), said("b")], "message 2: .* not show its tool calls"),
        (NAMES, [user("a"), calling("f"), result("9"), said("b")], "does not show the arguments of its tool calls"),
        (QUOTING, [user("a"), calling("f", "g"), result("8"), result("9"), said("b")], "does not show its tool calls"),
        (SHORT, [user("shout"), said("b")], "message 1: template mine drops or changes its content"),
        (SKIPPING, [{"role": "system", "content": "skipped"}, user("a"), said("b")], "message 1: .*role system"),
        (SKIPPING, [user("a"), said("b"), user("skipped"), said("b")], "message 3: .*role user"),
        (SKIPPING, [user("a"), calling("f"), result("skipped"), said("b")], "does not show its tool calls"),
        (SHORT, [user("a"), said("shout")], "message 2: .*drops or changes its content"),
        (BESIDE, [user("a"), calling("f", content="Let me see."), result("9"), said("b")], "has tool calls too"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_or_changes_is_refused(source: str, messages: list[Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        trained(source, messages)


def test_only_what_is_asked_for_is_refused() -> None:
    messages = [user("a"), said("shout"), user("c"), said("d")]
    assert trained(SHORT, messages, "last") == ["d<|im_end|>"]
    messages[1]["weight"] = 0
    assert trained(SHORT, messages)[-1] == "d<|im_end|>"
    with pytest.raises(RowError, match=r"message 2: .*drops or changes its content"):
        trained(SHORT, messages, "all")


def test_reasoning_that_is_not_shown_is_counted(tmp_path: Path) -> None:
    tokenizer, report = load_tokenizer(asset("smollm2")), Report()
    rows = [
        {"messages": [user("a"), said("b", thinking="Hm.")]},
        {"messages": [user("a"), said("<think>Hm.</think>b")]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    list(examples(tmp_path / "rows.jsonl", tokenizer, ChatTemplate("mine", CUT, tokenizer), Options(), report))
    (line,) = report.lines("escape")
    assert line.startswith("the template does not show the reasoning of messages, so it is not trained: 2 rows")
