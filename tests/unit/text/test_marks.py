"""Marks locate the texts of messages in what a template renders, and can be removed again."""

from typing import Any

import pytest

from megalite.text.marks import ARGUMENTS, CALL, CONTENT, START, THOUGHT, Mark, encode_mark, split_marks, with_marks


def test_marks_locate_the_text_within_its_whitespace() -> None:
    marked = with_marks({"role": "user", "content": "\n two words "}, 7)
    text, marks = split_marks("user: " + marked["content"].strip() + "|")
    assert text == "user: two words|"
    assert marks == [Mark(True, CONTENT, 7, 6), Mark(False, CONTENT, 7, 15)]


@pytest.mark.parametrize(("ends", "starts"), [((True, False), [True]), ((False, True), [False]), ((False, False), [])])
def test_one_end_alone(ends: tuple[bool, bool], starts: list[bool]) -> None:
    text, marks = split_marks(with_marks({"role": "user", "content": "a"}, 0, ends)["content"])
    assert (text, [mark.start for mark in marks]) == ("a", starts)


def test_each_kind_of_text_has_its_own_marks() -> None:
    calls = [{"type": "function", "function": {"name": name, "arguments": {"x": 1}}} for name in ("f", "g")]
    message: dict[str, Any] = {"role": "assistant", "content": "a", "reasoning_content": "b", "thinking": "b"}
    message["tool_calls"] = [*calls, {"name": "h", "arguments": {}}]
    marked = with_marks(message, 3)
    inner = [call.get("function", call) for call in marked["tool_calls"]]
    texts = [marked["content"], marked["reasoning_content"], marked["thinking"], *(call["name"] for call in inner)]
    found = [split_marks(text) for text in texts]
    assert [text for text, _ in found] == ["a", "b", "b", "f", "g", "h"]
    kinds = [{mark.kind for mark in marks} for _, marks in found]
    assert kinds == [{CONTENT}, {THOUGHT}, {THOUGHT}, {CALL}, {CALL + 1}, {CALL + 2}]
    assert [call["arguments"] for call in inner] == [{"x": 1}, {"x": 1}, {}]
    assert message["content"] == "a"  # the message itself is not changed
    assert "\ufdd4" not in str(message)


def test_blank_texts_and_other_roles_are_not_marked() -> None:
    assert with_marks({"role": "assistant", "content": " \n"}, 0) == {"role": "assistant", "content": " \n"}
    marked = with_marks({"role": "user", "content": "a", "reasoning_content": "b"}, 0)
    assert marked["reasoning_content"] == "b"


def test_instruction_and_input_are_marked_as_one_text() -> None:
    marked = with_marks({"role": "user", "content": "a\nb", "instruction": "a", "input": "b"}, 0)
    text, marks = split_marks(f"{marked['instruction']} / {marked['input']}")
    assert (text, [(mark.start, mark.at) for mark in marks]) == ("a / b", [(True, 0), (False, 5)])


def test_numbers_and_kinds_up_to_the_largest_row() -> None:
    _, (mark,) = split_marks(encode_mark(START, 9_999, CALL + 9_999))
    assert mark == Mark(True, CALL + 9_999, 9_999, 0)
    assert split_marks(encode_mark(START, 0, ARGUMENTS)) == ("", [Mark(True, ARGUMENTS, 0, 0)])
