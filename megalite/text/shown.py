"""Whether a chat template shows what a row says: a message that it drops or changes is not what would be trained."""

from __future__ import annotations

import re
from typing import Any

from megalite.text.messages import Message, RowError, has_reasoning
from megalite.text.spans import ARGUMENTS, CALL, CONTENT, START, THOUGHT, Render, Turns, mark_of, split_marks

THOUGHT_END = "</think>"
# switches of Qwen3 and SmolLM3 inside messages, which some templates take out
SWITCH = re.compile(r"/(?:no_)?think\b")


def check_contents(turns: Turns, template: str) -> dict[int, str]:
    """Messages of the assistant whose content the text does not show as it is, and why; RowError for any other's.

    What stands before `</think>` is reasoning, which templates leave out of earlier turns. Results of tools may be
    written in a form of the template's own.
    """
    changed = {}
    for index, message in enumerate(turns.messages):
        content = (message["content"] or "").strip()
        if not content or any(_shown(turns, index, text) for text in {content, SWITCH.sub("", content).strip()}):
            continue
        why = f"message {index + 1}: template {template} does not show its content, or not as it is"
        if message["role"] != "assistant":
            raise RowError(
                f"{why} (role {message['role']}); write its text into a message that is shown, or take another template"
            )
        changed[index] = why + (" beside its tool calls" if message.get("tool_calls") else "")
    return changed


def _shown(turns: Turns, index: int, content: str) -> bool:
    message = turns.messages[index]
    if not content:
        return True
    marks = [mark for mark in turns.of(index) if mark.kind == CONTENT]
    if not marks:
        # a template that looks into the message cannot be asked; one that could be does not show it
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
    """How many messages of the assistant have reasoning that the text does not show."""
    hidden = 0
    for index, message in enumerate(turns.messages):
        if message["role"] != "assistant":
            continue
        thought, end, _ = (message["content"] or "").rpartition(THOUGHT_END)
        thought = thought.rpartition("<think>")[2].strip() if end else ""
        if has_reasoning(message):
            seen = any(mark.kind == THOUGHT for mark in turns.of(index))
            hidden += not seen and (turns.can_mark(index) or message["reasoning_content"].strip() not in turns.text)
        elif thought:
            hidden += thought not in turns.text
    return hidden


def check_calls(turns: Turns, render: Render, template: str) -> None:
    """RowError where the text does not show a tool call with its arguments."""
    messages = turns.messages
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or []
        if not calls:
            continue
        names = {mark.kind for mark in turns.of(index) if mark.kind >= CALL}
        if turns.can_mark(index) and len(names) < len(calls):
            raise RowError(f"message {index + 1}: template {template} does not show its tool calls")
        wanted = sum(bool(_inner(call)["arguments"]) for call in calls)
        try:
            probe = render([*messages[:index], _probed(message), *messages[index + 1 :]], False)
        except RowError:
            continue  # it looks into the arguments, so it does not leave them out
        if sum(mark.kind == ARGUMENTS for mark in split_marks(probe)[1]) < wanted:
            raise RowError(f"message {index + 1}: template {template} does not show the arguments of its tool calls")


def _inner(call: Message) -> Message:
    inner: Any = call.get("function")
    return inner if isinstance(inner, dict) else call


def _probed(message: Message) -> Message:
    """A message with a mark among the arguments of each of its tool calls."""
    return {**message, "tool_calls": [_probed_call(call) for call in message["tool_calls"]]}


def _probed_call(call: Message) -> Message:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _probed_call(call["function"])}
    mark = mark_of(START, 0, ARGUMENTS)
    found = call["arguments"]
    if not found:
        return call
    return {**call, "arguments": found + mark if isinstance(found, str) else {**found, mark: mark}}
