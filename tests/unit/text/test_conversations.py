"""The known formats of instruction data, and rows that have none of them."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.data.instructions import Options, Report, examples
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.conversations import normalise, read_rows
from megalite.text.messages import Conversation, RowError
from megalite.text.tokenizer import load_tokenizer

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def roles(conversation: Conversation) -> str:
    return " ".join(f"{m['role']}={m['content']}" for m in conversation.messages)


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": [USER, ANSWER]}, "messages", "user=a assistant=b"),
        ({"messages": [USER, ANSWER], "prompt": "ignored"}, "messages", "user=a assistant=b"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
                    ANSWER,
                ]
            },
            "messages",
            "user=xy assistant=b",
        ),
        ({"instruction": "i", "output": "o"}, "Alpaca", "user=i assistant=o"),
        ({"instruction": "i", "input": "", "output": "o"}, "Alpaca", "user=i assistant=o"),
        (
            {"instruction": "i", "input": "n", "output": "o", "system": "s", "history": [["p", "q"]]},
            "Alpaca",
            "system=s user=p assistant=q user=i\nn assistant=o",
        ),
        (
            {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "system": "s"},
            "ShareGPT",
            "system=s user=h assistant=g",
        ),
        ({"conversations": [USER, ANSWER]}, "ShareGPT", "user=a assistant=b"),
        ({"prompt": "p", "completion": "c"}, "prompt/completion", "user=p assistant=c"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt/completion", "user=a assistant=b"),
    ],
)
def test_formats(row: Any, format: str, expected: str) -> None:
    found = normalise(row)
    assert (found.format, roles(found)) == (format, expected)
    assert found.weights == [None] * len(found.messages) or row.get("completion") == [ANSWER]


def test_function_calls_tools_and_weights() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [
        {"from": "human", "value": "h"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "{}"},
        {"from": "gpt", "value": "g", "weight": 0.5},
    ]
    found = normalise({"conversations": turns, "tools": '[{"name": "f"}]'})
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert (found.tools, found.weights) == ([{"name": "f"}], [None, None, None, 0.5])
    # OpenAI's arguments are text
    openai = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    found = normalise({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [openai]}]})
    assert found.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    # messages of the prompt are not trained
    found = normalise({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert found.weights == [0, 0, 0, None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "is a number, expected an object"),
        ({}, "none of the keys messages, conversations, instruction, prompt of the known formats; its keys are none"),
        ({"text": "x"}, "its keys are 'text'"),
        ({"messages": "x"}, "'messages' is text, expected a list"),
        ({"messages": []}, "has no messages"),
        ({"messages": [USER]}, "has no assistant message, so there is nothing to train on"),
        ({"messages": [3]}, "message 1 is a number, expected an object"),
        (
            {"messages": [USER, {"content": "b"}]},
            "message 2: its role is missing, expected system, user, assistant, tool",
        ),
        ({"messages": [{"role": "bot", "content": "b"}]}, "message 1: its role is 'bot'"),
        ({"messages": [{"role": ["user"], "content": "b"}]}, "message 1: its role is a list"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: its content is missing, expected text"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "message 2: its content is a number"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
            "message 2: a part of its content",
        ),
        ({"messages": [USER, {**ANSWER, "weight": "1"}]}, "message 2: its weight is '1', expected a number"),
        ({"messages": [USER, {**ANSWER, "weight": -1}]}, "message 2: its weight is -1"),
        ({"messages": [USER, {**ANSWER, "weight": float("nan")}]}, "message 2: its weight is nan"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f"}]}, "message 2: 'tool_calls' is not a list"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"arguments": "{"}]}]}, "arguments of a tool call is not JSON"),
        ({"instruction": "i"}, "'output' is missing"),
        ({"instruction": "i", "output": 5}, "'output' is a number, expected text"),
        ({"instruction": "i", "output": "o", "history": [["x"]]}, "turn 1 of 'history' is not a pair"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1: 'from' is 'alien', expected human"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "message 1: the function call is not JSON"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": 5}, "'tools' is a number, expected a list"),
        ({"prompt": "p"}, "'completion' is missing"),
        ({"prompt": "p\0", "completion": "c"}, "prompt contains a NUL character"),
        ({"prompt": "p", "completion": "\ufdd0"}, "completion contains U+FDD0"),
        ({"prompt": "p", "completion": "\ud800"}, "completion contains half a surrogate pair"),
    ],
)
def test_bad_rows_say_why(row: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert message in str(caught.value)


def test_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "p", "completion": str(i)} for i in range(3)]

    def values(path: Path) -> list[Any]:
        return [row.value for row in read_rows(path)]

    lines, array, table = tmp_path / "a.jsonl", tmp_path / "b.json", tmp_path / "c.parquet"
    lines.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    array.write_text(json.dumps(rows, indent=1), "utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "messages": None} for row in rows]), table)
    assert values(lines) == values(array) == values(table) == rows
    assert [row.where.removeprefix(str(tmp_path)) for row in read_rows(lines)] == [f"/a.jsonl:{n}" for n in (1, 3, 5)]
    assert [row.where.removeprefix(str(tmp_path)) for row in read_rows(table)][2] == "/c.parquet:row 3"
    (tmp_path / "d.json").write_text('{"prompt": 1}\n{"prompt": 2}\n')  # lines, whatever it is called
    assert values(tmp_path / "d.json") == [{"prompt": 1}, {"prompt": 2}]
    lines.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n' + b"[" * 100_000 + b"\n" + b"1" * 5000 + b"\n")
    found = values(lines)
    assert found[0] == {"a": 1}
    assert [type(value) for value in found[1:]] == [RowError] * 4
    for name, content, message in (
        ("e.json", b"[1, 2", "not JSON"),
        ("e.parquet", b"PAR1", "not a Parquet file"),
        ("e.csv", b"", "unknown suffix '.csv'"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_rows(tmp_path / name))
    with pytest.raises(ValueError, match="no such file"):
        list(read_rows(tmp_path / "none.json"))


@pytest.mark.parametrize("name", ["alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo", "identity"])
def test_files_that_people_have(name: str) -> None:
    found = [normalise(row.value) for row in islice(read_rows(asset(f"instructions/{name}.json")), 300)]
    assert len(found) >= 90
    assert {c.format for c in found} == {"ShareGPT" if "toolcall" in name else "Alpaca"}
    assert any(c.tools for c in found) == ("toolcall" in name)


NASTY = [
    *(
        None,
        True,
        0,
        -1.5,
        10**400,
        float("nan"),
        "",
        "x",
        "\0",
        "\ud800",
        "\udfff\ud800",
        "{{ 7 * 7 }}",
        "{% endfor %}",
    ),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{% generation %}",
        "\ufdd0\ufdd1",
        "<|im_end|>" * 50,
        "long " * 20_000,
        "\u202e🙂\u200d",
    ),
    *([], {}, [[]], [None], {"role": "user"}, {"role": "assistant", "content": None}, {"from": "gpt"}),
]
KEYS = [
    "messages",
    "conversations",
    "instruction",
    "prompt",
    "completion",
    "output",
    "input",
    "history",
    "tools",
    "system",
]


def nasty(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(6)
    if kind < 3 or depth > 3:
        return draw.choice(NASTY)
    if kind == 3:
        return [nasty(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 4:
        names = ["role", "content", "from", "value", "weight", "tool_calls", *KEYS]
        return {draw.choice(names): nasty(draw, depth + 1) for _ in range(draw.randrange(5))}
    role = draw.choice(["user", "assistant", "system", "tool"])
    return {"role": role, "content": draw.choice(NASTY), "weight": draw.choice([None, 0, 1])}


def test_a_thousand_fuzzed_rows(tmp_path: Path) -> None:
    """Each row is rendered, or refused with file and line; nothing in it is executed."""
    draw = random.Random(0)
    lines = []
    for number in range(1000):
        row: Any = {draw.choice(KEYS): nasty(draw) for _ in range(draw.randrange(1, 5))}
        if number % 3 == 0:
            row = {"messages": [nasty(draw), {"role": "assistant", "content": draw.choice(NASTY)}]}
        if number % 10 == 1:
            row = {"messages": [{"role": "user", "content": draw.choice(NASTY)}, ANSWER]}
        if number % 50 == 7:
            for _ in range(draw.choice([10, 100, 300])):
                row = {"messages": [row]}
        line = json.dumps(row)
        lines.append(line[: draw.randrange(len(line))] if number % 40 == 3 else line)
    path = tmp_path / "fuzz.jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = load_tokenizer(asset("smollm2"))
    for name in (None, "chatml"):
        report = Report()
        chat = ChatTemplate(*find_template(name, tokenizer), tokenizer)
        found = list(examples(path, tokenizer, chat, Options(bad_rows="skip"), report))
        assert len(found) + len(report.bad) == sum(1 for line in lines if line.strip())
        assert len(found) >= 40
        assert all(line.startswith(f"{path}:") and "\n" not in line.replace("\\n", "") for line in report.bad)
        assert {example.where for example in found} & {line.split(": ")[0] for line in report.bad} == set()
        said = "".join(example.text for example in found)
        assert "{{ 7 * 7 }}" in said
        assert "{% endfor %}" in said
        for example in found:  # no control token but the template's own
            turns = len(example.conversation.messages)
            extra = name is None and example.conversation.messages[0]["role"] != "system"
            assert example.encoding.ids.count(tokenizer.eos_id) == turns + extra
    with pytest.raises(ValueError, match=r"fuzz\.jsonl:\d+: .* \(data\.bad_rows=skip skips such rows\)"):
        list(examples(path, tokenizer, chat, Options(), Report()))
