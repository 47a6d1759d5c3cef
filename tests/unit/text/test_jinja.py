"""Jinja behaves as in transformers, within limits."""

import datetime
import json
import threading
import time
from functools import cache
from typing import Any

import pytest
from assets import asset

from megalite.data.instructions import Options, Report, examples
from megalite.text.chat import ChatTemplate
from megalite.text.conversations import normalise
from megalite.text.jinja import LimitError, Template
from megalite.text.messages import RowError
from megalite.text.tokenizer import load_tokenizer

NOW = datetime.datetime(2024, 5, 6, 7, 8, 9)
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def rendered(source: str, **names: Any) -> str:
    return Template("mine", source).render(NOW, False, (2, 0), **names)


TOKENIZER = cache(lambda: load_tokenizer(asset("smollm2")))
ITEMS = "1bFalse22aTrue2"
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
ENDLESS = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "recursive": "{% for x in [1, 2] recursive %}{% if loop.depth < 80 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'abcdefgh' * 1000 }}{% endfor %}",
    "times": "{{ 'a' * 10 ** 12 }}",
    "list": "{{ [0] * 10 ** 12 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "digits": "{% set ns = namespace(x=9) %}{% for i in range(9999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "plus": DOUBLING + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "tilde": DOUBLING + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "set block": DOUBLING + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "filter": "{{ 'a' | center(10 ** 12) }}",
    "indent": "{{ [1] | tojson(indent=10 ** 12) }}",
    "method": "{{ 'a'.ljust(10 ** 12) }}",
    "percent": "{{ '%1000000000000d' % 1 }}",
    "star": "{{ '%*d' % (10 ** 12, 1) }}",
    "format": "{{ '{:>1000000000000}'.format(1) }}",
    "nested format": "{{ '{:>{}}'.format(1, 10 ** 12) }}",
    "replace": "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "replace filter": "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    "join": "{{ ([1] * 10 ** 6) | join('b' * 10 ** 6) }}",
    "join method": "{{ ('b' * 10 ** 6).join(['a'] * 10 ** 6) }}",
    "words": "{{ lipsum(n=10 ** 12) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_stopped_by_name(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(LimitError, match="chat template mine: stopped"):
        rendered(ENDLESS[name])
    assert time.monotonic() - start < 60  # not a timing: without a limit it would be years or all memory


@pytest.mark.parametrize("source", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ (1).bit_length.x.y }}"])
def test_what_python_stops_is_a_message(source: str) -> None:
    with pytest.raises(RowError, match="template mine"):
        ChatTemplate("mine", source, TOKENIZER()).render(normalise(ROW))


def test_the_limit_holds_in_threads_and_stops_even_where_rows_are_skipped(tmp_path: Any) -> None:
    chat = ChatTemplate("mine", ENDLESS["two loops"], TOKENIZER())
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    met: list[str] = []

    def work() -> None:
        try:
            list(
                examples(
                    tmp_path / "rows.jsonl",
                    TOKENIZER(),
                    chat,
                    Options(bad_rows="skip"),
                    Report(),
                )
            )
        except ValueError as error:
            met.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(met) == 1
    assert "chat template mine: stopped after 2000000 steps of one rendering" in met[0]


def test_long_conversations_may_compare_each_message_with_each() -> None:
    source = "{% for a in messages %}{% for b in messages %}{% endfor %}{{ loop.last }}{% endfor %}"
    text = Template("mine", source).render(NOW, False, (2000, 0), messages=[0] * 2000)
    assert text == "False" * 1999 + "True"


def test_a_long_message_is_within_the_limits() -> None:
    text = "word " * 4_000_000
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]}
    chat = ChatTemplate("mine", "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}", TOKENIZER())
    assert len(chat.render(normalise(row)).text) == len(text) + 21


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ x | tojson }}", '{"b": "é<", "a": [1, null]}'),
        ("{{ x | tojson(sort_keys=true) }}", '{"a": [1, null], "b": "é<"}'),
        ("{{ x | tojson(separators=(',', ':')) }}", '{"b":"é<","a":[1,null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ x.b | tojson(true) }}", '"\\u00e9<"'),
        ("{{ strftime_now('%d %b %Y') }}", "06 May 2024"),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02345678"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for k, v in x.items() %}{{ loop.index }}{{ k }}{{ loop.last }}{{ loop.length }}{% endfor %}", ITEMS),
        ("{% for i in [1, 2, 3] if i != 2 %}{{ loop.revindex, loop.previtem }}{% endfor %}", "(2, Undefined)(1, 1)"),
        ("{% for i in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for i in none_such %}{% endfor %}{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{% set x | upper %}a{% endset %}{{ x }}", "A"),
        ("{{ 123456789 }}{{ '%d' % 123456789 }}{{ 'a%d' | format(987654321) }}", "123456789123456789a987654321"),
        ("{{ namespace(a=99999999999).a }}{{ none_such | default(12345678901) }}", "9999999999912345678901"),
        ("  {% if true %}\n a\n  {%- endif %}\n", " a"),
        ("{{ ', '.join(['a', 'b']) }}{{ 'aXb'.split('X')[-1] }}{{ ['a'] | join('-') }}", "a, bba"),
        ("{% generation %}a{% endgeneration %}", "a"),
    ],
)  # fmt: skip
def test_as_in_transformers(source: str, expected: str) -> None:
    names = {"x": {"b": "é<", "a": [1, None]}}
    assert rendered(source, **names) == expected
    if "strftime" not in source:
        theirs = pytest.importorskip("transformers.utils.chat_template_utils")
        assert theirs._compile_jinja_template(source).render(**names) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% for %}", "chat template mine, line 2: "),
        ("{{ x | nosuch }}", "chat template mine, line 1: No filter named"),
        ("{% for x in y %}" * 30 + "{% endfor %}" * 30, "nested too deeply"),
        ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "nested too deeply"),
    ],
)
def test_invalid_templates_are_refused_at_once(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template("mine", source)


def test_one_time_of_day_for_all_of_a_row() -> None:
    """A prompt is found in the text even if both contain the time."""
    source = (
        "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    found = ChatTemplate("mine", source, TOKENIZER()).render(normalise(ROW))
    (span,) = found.spans
    assert found.text[span.start : span.stop] == "b<|im_end|>"
