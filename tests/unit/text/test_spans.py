"""What the assistant says in templates without marks, written here to behave as those that models ship."""

import json
from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.data.instructions import Options, Report, examples
from megalite.text.chat import BUILT_IN, ChatTemplate, template_names
from megalite.text.conversations import normalise
from megalite.text.masks import weighted_spans
from megalite.text.messages import RowError
from megalite.text.tokenizer import load_tokenizer

ROWS: dict[str, Any] = json.loads((Path(__file__).with_name("golden") / "conversations.json").read_text("utf-8"))


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
# thinking is cut out of every turn, while the prompt opens it; calls concatenate text; results share one block
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
# another end behind the whole conversation
TWO_ENDS = (
    "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# tools stand in the last turn of the user, so that no shorter conversation begins as a longer one
LAST_USER = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}<s>"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[CALLS] ' + m.tool_calls | map(attribute='function') | list | tojson + '<|im_end|>' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '<|im_end|>' }}"
    "{% else %}{{ '[RESULT] ' + m.content + '[/RESULT]' }}{% endif %}{% endfor %}"
)
# the turn of the user ends with the header of the assistant; no prompt is known
HEADLESS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content | trim + "
    "'<|im_end|>\n<|im_start|>assistant\n' }}{% else %}{{ m.content | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# an end of the text alone, and nothing at the end of a turn
ONE_END = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% else %}<|im_end|>{% endif %}"
)
# the result of a tool is introduced by the name of the call
QUOTING = (
    "{% set ns = namespace(name='') %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>{{ ns.name }}\n{{ m.content }}<|im_end|>{% else %}" + HEAD + "{{ m.content }}"
    "{% for c in (m.tool_calls or [])[:1] %}{% set ns.name = c.function.name %}{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# works only where there is a message, as most do that look at messages[0]
FIRST_LOOKED_AT = "{% if messages[0].role != 'system' %}{{ 'Be good.\n' }}{% endif %}" + TWO_ENDS
CALL = '{"name": "f", "arguments": {"x": 1}}'
# switches are taken out of the system message, and the generation block holds the header too
SWITCHED = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set off = '/no_think' in system %}<|im_start|>system\n"
    "{% set rest = system.replace('/no_think', '').replace('/think', '').rstrip() %}"
    "{{ 'Mode: ' + ('off' if off else 'on') + '\n' + (rest or 'Be good.') }}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' %}" + HEAD + "{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n' if off else '' }}{{ m.content.lstrip('\n') }}<|im_end|>\n{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (CUT, [user("a"), said("b"), user("c"), said("d")], ["b" + E, "d" + E]),
        (CUT, [user("a"), said("a"), user("a"), said("a")], ["a" + E, "a" + E]),
        (CUT, [user("a"), said("<think>\nb\n</think>\n\nc"), user("d"), said("<tool>")], ["\n\nc" + E, "<tool>" + E]),
        (
            CUT,
            [user("a"), calling("f", "g"), result("8"), result("9"), said("b")],
            ['<c>f\n{"x": 1}</c><c>g\n{"x": 1}</c>' + E, "b" + E],
        ),
        (TWO_ENDS, [user("a"), said("b"), user("c"), said(" d\n")], ["b" + E, " d\n" + E]),
        (TWO_ENDS, [user("a"), said(""), user("c"), said("")], [E, E]),
        (LAST_USER, [user("a"), said("b "), user("c"), said(" d")], [" b" + E, " d" + E]),
        (
            LAST_USER,
            [user("a"), calling("f"), result("9"), said("b"), user("c"), said("d")],
            ['[CALLS] [{"name": "f", "arguments": {"x": 1}}]' + E, " b" + E, " d" + E],
        ),
        (HEADLESS, [user("a\n"), said("\nb"), user("c"), said("d")], ["b" + E, "d" + E]),
        (ONE_END, [user("a"), said("b"), user("c"), said("d")], ["b\n", "d\n" + E]),
        (QUOTING, [user("a"), calling("f"), result("9"), said("b")], [CALL + E, "b" + E]),
        *(
            (SWITCHED, [*system, user("a"), said("b")], [f"<|im_start|>assistant\n{thought}b{E}\n"])
            for system, thought in (
                ([], ""),
                ([{"role": "system", "content": "Be brief. /no_think"}], "<think>\n\n</think>\n"),
                ([{"role": "system", "content": "/no_think"}], "<think>\n\n</think>\n"),
                ([{"role": "system", "content": "/think Be brief."}], ""),
            )
        ),
        (FIRST_LOOKED_AT, [said("a"), user("b"), said("c")], ["a" + E, "c" + E]),
    ],
)  # fmt: skip
def test_spans(source: str, messages: list[Any], expected: list[str]) -> None:
    assert trained(source, messages, tools=TOOLS) == expected
    assert trained(source, messages, "last", tools=TOOLS) == expected[-1:]


@pytest.mark.parametrize("name", [name for name in template_names() if name != "alpaca"])
@pytest.mark.parametrize("row", ROWS)
def test_built_ins_without_their_marks(name: str, row: str) -> None:
    """The spans of every built-in template are found where its marks put them."""
    source = (BUILT_IN / f"{name}.jinja").read_text("utf-8")
    bare = source.replace("{%- generation %}", "{%- if true %}").replace("{%- endgeneration %}", "{%- endif %}")
    tokenizer, found = load_tokenizer(asset("smollm2")), normalise(ROWS[row])
    if any("tool_calls" in message for message in found.messages) and name in ("llama2", "mistral"):
        return
    marked = ChatTemplate(name, source, tokenizer).render(found)
    unmarked = ChatTemplate(name, bare, tokenizer).render(found)
    assert (unmarked.text, unmarked.refused) == (marked.text, {})
    assert unmarked.spans == marked.spans


MARKED = "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (  # as trl marks Phi-3: one more block behind the last turn
            "{% for m in messages %}" + HEAD + "{% if m.role == 'assistant' %}" + MARKED + "{% else %}{{ m.content }}"
            "{% endif %}{% endfor %}{% generation %}<|endoftext|>{% endgeneration %}",
            ["b<|im_end|>\n", "d<|im_end|>\n<|endoftext|>"],
        ),
        (  # more blocks of one message, the first before its header
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + HEAD + "{% endgeneration %}"
            "{% generation %}{{ m.content }}{% endgeneration %}-{% generation %}!{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            ["<|im_start|>assistant\nb", "!", "<|im_start|>assistant\nd", "!"],
        ),
        (  # one block around all
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            ["abcd"],
        ),
        (  # only the last turn
            "{% for m in messages %}{% if loop.last %}" + MARKED + "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            ["d<|im_end|>\n"],
        ),
        (  # a block inside a block
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}(" + MARKED + ")"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            ["(b<|im_end|>\n)", "(d<|im_end|>\n)"],
        ),
    ],
)
def test_generation_blocks_of_every_kind(source: str, expected: list[str]) -> None:
    assert trained(source, [user("a"), said("b"), user("c"), said("d")]) == expected


def test_a_block_around_more_messages_cannot_weigh_them_apart() -> None:
    source = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    messages = [user("a"), said("b", weight=0), user("c"), said("d")]
    with pytest.raises(RowError, match="marks messages 2 to 4 as one block of generation"):
        trained(source, messages)
    with pytest.raises(RowError, match="as one block of generation"):
        trained(source, [user("a"), said("b"), user("c"), said("d")], "last")


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
        (SHORT, [user("shout"), said("b")], "message 1: template mine does not show its content, or not as it is"),
        (SKIPPING, [{"role": "system", "content": "skipped"}, user("a"), said("b")], "message 1: .*role system"),
        (SKIPPING, [user("a"), said("b"), user("skipped"), said("b")], "message 3: .*role user"),
        (SKIPPING, [user("a"), calling("f"), result("skipped"), said("b")], "does not show its tool calls"),
        (SHORT, [user("a"), said("shout")], "message 2: .*does not show its content"),
        (BESIDE, [user("a"), calling("f", content="Let me see."), result("9"), said("b")], "beside its tool calls"),
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
    with pytest.raises(RowError, match=r"message 2: .*does not show its content"):
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
