"""What the conversion of a file notices, and how it survives in the sidecar."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from assets import asset

from megalite.data.report import Report, from_sidecar, locate
from megalite.text.messages import Conversation
from megalite.text.tokenizer import Tokenizer, load_tokenizer

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(asset("smollm2"))


def inspected(tokenizer: Tokenizer, text: str, where: str = "f:1", tools: Any = None, **message: Any) -> Report:
    report, encoding = Report(), tokenizer.encode_chat(text)
    weights = np.ones(len(encoding.ids))
    conversation = Conversation("messages", [{**USER, **message}, ANSWER], [None, None], tools)
    report.inspect(where, conversation, text, encoding, weights, tokenizer)
    return report


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("q a<|im_end|>", []),
        ("q a", ["endless"]),
        ("<|endoftext|><|endoftext|>q a<|im_end|>", []),
        ("<|im_start|><|im_start|>q a<|im_end|>", ["double_bos"]),
        ("q a</s><|im_end|>", ["unknown </s>"]),
        ("<|eot_id|>q a</s>", ["endless", "unknown </s>", "unknown <|eot_id|>"]),
    ],
)
def test_what_is_noticed_in_a_text(smollm2: Tokenizer, text: str, seen: list[str]) -> None:
    report = inspected(smollm2, text)
    assert report.seen == dict.fromkeys(seen, (1, "f:1"))
    assert report.unknown == [what.split()[1] for what in seen if " " in what]
    assert report.formats == {"messages": 1}


def test_strings_that_a_message_holds_are_not_the_template_s(smollm2: Tokenizer) -> None:
    assert inspected(smollm2, "</s> a<|im_end|>", content="</s>").seen == {}


def test_tools_that_the_text_does_not_show(smollm2: Tokenizer) -> None:
    for tool in ({"name": "weather"}, {"type": "function", "function": {"name": "weather"}}):
        assert inspected(smollm2, "q a<|im_end|>", tools=[tool]).seen == {"tools": (1, "f:1")}
        assert inspected(smollm2, "weather q a<|im_end|>", tools=[tool]).seen == {}


def test_rows_are_counted_and_the_first_is_named() -> None:
    report = Report(bad=["f:3: wrong", "f:4: wrong"], controls=3)
    for where in ("f:7", "f:9"):
        report.count("controls", where)
    report.count("dropped assistant", "f:8")
    assert list(report.lines("escape")) == [
        "skipped 2 bad rows (data.bad_rows=skip): f:3: wrong; f:4: wrong",
        "3 control strings inside messages were encoded as ordinary text: 2 rows (the first: f:7)",
        "the template drops or changes messages of role assistant: 1 row (the first: f:8)",
    ]
    assert "were left as control tokens" in list(report.lines("warn"))[1]


@pytest.mark.parametrize("form", [":", ":row "])
def test_places_are_kept_where_lines_are_not_consecutive(smollm2: Tokenizer, form: str) -> None:
    report, lines = Report(), [2, 3, 4, 9, 10, 12]
    encoding = smollm2.encode_chat("a<|im_end|>")
    for line in lines:
        conversation = Conversation("messages", [USER, ANSWER], [None, None])
        report.inspect(f"f{form}{line}", conversation, "a", encoding, np.ones(len(encoding.ids)), smollm2)
    assert report.places == [(0, 2), (3, 9), (5, 12)]
    assert [locate(report, number, "g") for number in range(6)] == [f"g{form}{line}" for line in lines]
    assert locate(Report(), 4, "g") == "g, conversation 5"


def test_a_report_comes_back_under_another_name() -> None:
    report = Report(Counter({"messages": 4}), ["a/f:3: wrong"], 2, {"endless": (1, "a/f:4")}, [(0, 1), (2, 4)], ":")
    values = json.loads(json.dumps(report.to_sidecar("a/f")))
    assert "a/f" not in json.dumps(values)
    found = from_sidecar(values, "b/g")
    assert (found.bad, found.seen, found.places) == (["b/g:3: wrong"], {"endless": (1, "b/g:4")}, [(0, 1), (2, 4)])
    assert from_sidecar(values, "a/f") == report
    for key in values:
        with pytest.raises(ValueError, match=r"^the report on f in its sidecar is damaged .*; make the data again$"):
            from_sidecar({name: value for name, value in values.items() if name != key}, "f")
