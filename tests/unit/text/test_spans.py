"""Spans in templates without generation tags, which behave like those that models ship."""

from typing import Any

import pytest
from assets import asset
from chats import CUT, HEAD, QUOTING, ROWS, E, calling, result, said, trained, user

from megalite.text.chat import BUILT_IN, ChatTemplate, template_names
from megalite.text.conversations import normalise
from megalite.text.messages import RowError
from megalite.text.tokenizer import load_tokenizer

# a second end after the whole conversation
TWO_ENDS = (
    "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# tools are in the last user turn, so a shorter conversation never starts like a longer one
LAST_USER = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}<s>"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == users[-1] %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[CALLS] ' + m.tool_calls | map(attribute='function') | list | tojson + '<|im_end|>' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '<|im_end|>' }}"
    "{% else %}{{ '[RESULT] ' + m.content + '[/RESULT]' }}{% endif %}{% endfor %}"
)
# the user turn ends with the assistant's header; add_generation_prompt is ignored
HEADLESS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content | trim + "
    "'<|im_end|>\n<|im_start|>assistant\n' }}{% else %}{{ m.content | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
# an end after the whole text, but none after a turn
ONE_END = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% else %}<|im_end|>{% endif %}"
)
# fails without messages, like most templates that read messages[0]
FIRST_LOOKED_AT = "{% if messages[0].role != 'system' %}{{ 'Be good.\n' }}{% endif %}" + TWO_ENDS
CALL = '{"name": "f", "arguments": {"x": 1}}'
# switches are removed from the system message, and the generation block includes the header
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
    """Without their tags, built-in templates have the same spans as with them."""
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


def test_messages_in_one_block_must_have_the_same_weight() -> None:
    source = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    messages = [user("a"), said("b", weight=0), user("c"), said("d")]
    with pytest.raises(RowError, match="puts messages 2 to 4 into one generation block"):
        trained(source, messages)
    with pytest.raises(RowError, match="into one generation block"):
        trained(source, [user("a"), said("b"), user("c"), said("d")], "last")
