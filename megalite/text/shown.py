"""Checks that a chat template shows every message of a row: text that it drops or changes would not be trained."""

from __future__ import annotations

import re
from typing import Any

from megalite.text.marks import ARGUMENTS, CALL, CONTENT, START, THOUGHT, encode_mark, split_marks
from megalite.text.messages import Message, RowError, has_reasoning
from megalite.text.spans import Render, Turns

THOUGHT_END = "</think>"
# switches of Qwen3 and SmolLM3 inside messages, which some templates remove
SWITCH = re.compile(r"/(?:no_)?think\b")


def check_contents(turns: Turns, template: str) -> dict[int, str]:
    """Return the assistant's messages whose content the text drops or changes, by number, with the reason.

    Text before `</think>` is reasoning, which templates may leave out of earlier turns. Tool results may be rewritten.

    Raises RowError if the text drops or changes a message of another role.
    """
    changed = {}
    for index, message in enumerate(turns.messages):
        content = (message["content"] or "").strip()
        if not content or any(_shown(turns, index, text) for text in {content, SWITCH.sub("", content).strip()}):
            continue
        why = f"message {index + 1}: template {template} drops or changes its content"
        if message["role"] != "assistant":
            raise RowError(
                f"{why} (role {message['role']}); move the text into a message that is shown, or use another template"
            )
        changed[index] = why + (" (it has tool calls too)" if message.get("tool_calls") else "")
    return changed


def _shown(turns: Turns, index: int, content: str) -> bool:
    message = turns.messages[index]
    if not content:
        return True
    marks = [mark for mark in turns.marks_of(index) if mark.kind == CONTENT]
    if not marks:
        # if the message can be marked, it is missing; if the template reads it, only its text can be looked for
        return not turns.can_mark(index) and content in turns.text
    if message["role"] == "tool":
        return True
    stops = [mark.at for mark in marks if not mark.start]
    starts = [mark.at for mark in marks if mark.start]
    if "input" in message and "instruction" in message and content not in turns.text:
        between = turns.text[starts[0] : stops[0]] if starts and stops else ""
        return between.startswith(message["instruction"].strip()) and between.endswith(message["input"].strip())
    if starts and not stops:
        return turns.text.startswith(content, starts[-1])
    if turns.text.endswith(content, 0, stops[-1]):
        return True
    answer = content.rpartition(THOUGHT_END)[2].strip()
    return message["role"] == "assistant" and THOUGHT_END in content and turns.text.endswith(answer, 0, stops[-1])


def hidden_reasoning(turns: Turns) -> int:
    """Count the assistant's messages whose reasoning the text does not show."""
    hidden = 0
    for index, message in enumerate(turns.messages):
        if message["role"] != "assistant":
            continue
        thought, end, _ = (message["content"] or "").rpartition(THOUGHT_END)
        thought = thought.rpartition("<think>")[2].strip() if end else ""
        if has_reasoning(message):
            marked = any(mark.kind == THOUGHT for mark in turns.marks_of(index))
            hidden += not marked and (turns.can_mark(index) or message["reasoning_content"].strip() not in turns.text)
        elif thought:
            hidden += thought not in turns.text
    return hidden


def check_calls(turns: Turns, render: Render, template: str) -> None:
    """Raise RowError if the text does not show every tool call with its arguments."""
    messages = turns.messages
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if not calls:
            continue
        names = {mark.kind for mark in turns.marks_of(index) if mark.kind >= CALL}
        if turns.can_mark(index) and len(names) < len(calls):
            raise RowError(f"message {index + 1}: template {template} does not show its tool calls")
        wanted = sum(bool(_inner(call)["arguments"]) for call in calls)
        try:
            probe = render([*messages[:index], _probed(message), *messages[index + 1 :]], False)
        except RowError:
            continue  # the template reads the arguments, so it does not drop them
        if sum(mark.kind == ARGUMENTS for mark in split_marks(probe)[1]) < wanted:
            raise RowError(f"message {index + 1}: template {template} does not show the arguments of its tool calls")


def _inner(call: Message) -> Message:
    inner: Any = call.get("function")
    return inner if isinstance(inner, dict) else call


def _probed(message: Message) -> Message:
    """Return a copy of a message with a mark in the arguments of each tool call."""
    return {**message, "tool_calls": [_probed_call(call) for call in message["tool_calls"]]}


def _probed_call(call: Message) -> Message:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _probed_call(call["function"])}
    mark = encode_mark(START, 0, ARGUMENTS)
    arguments = call["arguments"]
    if not arguments:
        return call
    return {**call, "arguments": arguments + mark if isinstance(arguments, str) else {**arguments, mark: mark}}
