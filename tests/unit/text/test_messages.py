"""The spellings of messages in public data are converted to one form."""

import json
from pathlib import Path
from typing import Any

import pytest
from assets import asset

from megalite.text.chat import ChatTemplate, find_template
from megalite.text.conversations import normalise, read_rows
from megalite.text.messages import RowError
from megalite.text.tokenizer import load_tokenizer

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def one(**more: Any) -> Any:
    return normalise({"messages": [USER, {**ANSWER, **more}]})


def text(row: Any, name: str) -> str:
    tokenizer = load_tokenizer(asset("smollm2"))
    return ChatTemplate(*find_template(name, tokenizer), tokenizer).render(normalise(row)).text


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({}, None),
        ({"weight": 0.5}, 0.5),
        ({"weight": None, "train": None}, None),
        ({"train": False}, 0.0),
        ({"train": True}, 1.0),
        ({"training": False}, 0.0),  # axolotl
        ({"loss": False}, 0.0),  # ms-swift
        ({"loss": 1}, 1.0),
        ({"train": 0}, 0.0),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": 1, "train": False}, 0.0),
    ],
)
def test_whether_a_message_is_trained(given: Any, weight: float | None) -> None:
    found = one(**given)
    assert found.weights[1] == weight
    assert found.messages[1] == ANSWER  # templates do not see it
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **given}]
    assert normalise({"conversations": turns}).weights[1] == weight


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "no"}, "message 2: 'train' is 'no', expected true or false"),
        ({"train": 2}, "'train' is '2'"),
        ({"weight": True}, "its weight is True"),
        *(
            ({key: value}, f"message 2: the key {key!r} is unknown and may affect training; use 'weight'")
            for key, value in (
                ("mask", 1),
                ("loss_mask", 0),
                ("train_detail", []),
                ("ignore", True),
                ("loss_weight", 1),
            )
        ),
    ],
)
def test_flags_whose_meaning_is_not_known_are_refused(given: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        one(**given)
    assert message in str(caught.value)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"content": "", "function_call": {"arguments": {"x": 1}, "name": "f"}},
        {"function_call": {"name": "f", "arguments": '{"x": 1}'}, "tool_calls": None},
        {"content": None, "tool_calls": [{"type": "function", "function": {"arguments": '{"x": 1}', "name": "f"}}]},
        {"tool_calls": [CALL], "function_call": None, "refusal": None, "audio": None},
    ],
)
def test_tool_calls_old_and_new_are_one(message: Any) -> None:
    row = {
        "messages": [USER, {"role": "assistant", **message}, {"role": "function", "name": "f", "content": "9"}, ANSWER],
        "functions": [{"name": "f", "parameters": {"default": None}}],
    }
    found = normalise(row)
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert list(found.messages[1]["tool_calls"][0]["function"]) == ["name", "arguments"]
    assert found.messages[2] == {"role": "tool", "name": "f", "content": "9"}
    assert found.tools == [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    for name in ("chatml", "qwen", "qwen3", "plain"):
        assert '{"name": "f", "arguments": {"x": 1}}' in text(row, name)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"function_call": "f"}, "'function_call' is text, expected an object"),
        ({"function_call": {"arguments": "{}"}}, "a tool call has no name"),
        ({"tool_calls": [CALL], "function_call": CALL["function"]}, "has both 'function_call' and 'tool_calls'"),
        ({"tool_calls": [{"name": "f", "parameters": {}}]}, "rename them to 'arguments'"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "the arguments of a tool call are a list"),
        ({"tool_calls": [{"name": "f", "arguments": '{"x": "\\ufdd0"}'}]}, "contains U+FDD0"),
        ({"role": "user", "tool_calls": [CALL]}, "role user has tool calls"),
        ({"reasoning_content": ["x"]}, "reasoning_content must be text, and the same text in each key"),
        (
            {"reasoning_content": "x", "thinking": "y"},
            "reasoning_content and thinking must be text, and the same text in each key",
        ),
    ],
)
def test_bad_calls_and_reasoning_say_why(message: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        normalise({"messages": [USER, {**ANSWER, **message}, ANSWER]})
    assert reason in str(caught.value)
    assert str(caught.value).startswith(("message 2: ", "message 2 has", "a tool call"))


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_any_of_its_names(key: str) -> None:
    row = {"messages": [USER, {**ANSWER, key: "Hm."}]}
    assert normalise(row).messages[1] | {key: 0} == {**ANSWER, "reasoning_content": "Hm.", "thinking": "Hm.", key: 0}
    assert text(row, "qwen3").endswith("<|im_start|>assistant\n<think>\nHm.\n</think>\n\nb<|im_end|>\n")
    tokenizer = load_tokenizer(asset("smollm2"))
    assert ChatTemplate(*find_template("chatml", tokenizer), tokenizer).render(normalise(row)).unshown == 1


def test_nulls_mean_missing_keys_in_parquet_but_are_kept_in_json(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(name: str, arguments: Any, **schema: Any) -> Any:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        properties = {key: {"type": "integer", **schema} for key in arguments}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        return {"messages": [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": [call]}], "tools": [tool]}

    rows = [row("f", {"x": 1}), row("g", {"y": 2})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    read = [normalise(each.value) for each in read_rows(tmp_path / "t.parquet")]
    assert read == [normalise(each) for each in rows]
    meant = row("f", {"x": None}, default=None, enum=[1, None])
    (tmp_path / "t.jsonl").write_text(json.dumps(meant) + "\n")
    (found,) = [normalise(each.value) for each in read_rows(tmp_path / "t.jsonl")]
    assert found.tools == meant["tools"]
    assert found.messages[1]["tool_calls"] == meant["messages"][1]["tool_calls"]


def test_a_system_text_next_to_the_messages() -> None:
    assert normalise({"system": "s", "messages": [USER, ANSWER]}).messages[0] == {"role": "system", "content": "s"}
    with pytest.raises(RowError, match="has 'system' and also a message of role system"):
        normalise({"system": "s", "messages": [{"role": "system", "content": "t"}, USER, ANSWER]})
