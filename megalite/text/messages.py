"""The one form of a conversation's messages, and the conversion of OpenAI's spellings into it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from megalite.text.rows import NotJSONError, json_type, parse_json

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MOST = 10_000  # messages of a row, and tool calls of a message
# Unicode noncharacters, which no text may contain: they serve as marks while chat templates render
RESERVED = re.compile("[\ufdd0-\ufdef]")
# keys for the model's reasoning before its answer, in templates and data sets
REASONING = ("reasoning_content", "thinking", "reasoning")
# boolean keys that say whether a message is trained (Hugging Face and axolotl, ms-swift)
TRAINED = ("train", "training", "loss")


class RowError(ValueError):
    """What is wrong with one row. The caller adds file and line."""


@dataclass(frozen=True)
class Conversation:
    """One conversation.

    `messages`: dicts with a `role` from ROLES and a `content` string; the assistant's may have `tool_calls`.
    `weights`: the loss weight of each message, None if the row sets none. `tools`: JSON schemas, unchanged.
    """

    format: str
    messages: list[Message]
    weights: list[float | None]
    tools: list[Any] | None = field(default=None)


def conversation(name: str, raw: list[Any], tools: list[Any] | None) -> Conversation:
    """Check messages in OpenAI's current or older form and convert them. Raises RowError with the message's number."""
    if len(raw) > MOST:
        raise RowError(f"has {len(raw)} messages; more than {MOST} in one row are not supported")
    messages, weights = [], []
    for number, message in enumerate(raw, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{where} is {json_type(message)}, expected an object with role and content")
        kept = {key: value for key, value in message.items() if value is not None}
        weights.append(_weight(kept, where))
        role = "tool" if kept.get("role") == "function" else kept.get("role")
        if role not in ROLES:
            shown = f"{role[:40]!r}" if isinstance(role, str) else "missing" if role is None else json_type(role)
            raise RowError(f"{where}: its role is {shown}, expected {', '.join(ROLES)}")
        calls = _calls(kept, role, where)
        kept |= {"role": role, "content": _content(kept, where, may_lack=bool(calls))}
        if calls:
            kept["tool_calls"] = calls
        messages.append(_with_reasoning(kept, where) if role == "assistant" else kept)
    return Conversation(name, messages, weights, tools)


def parse(text: str, what: str) -> Any:
    """Parse JSON inside a string. Raises RowError that begins with `what`."""
    try:
        return parse_json(text.encode())
    except NotJSONError:
        raise RowError(f"{what} is not JSON: {text[:60]!r}") from None
    except ValueError as error:
        raise RowError(f"{what}: {error}") from None


def _weight(message: Message, where: str) -> float | None:
    """Remove the weight keys from a message and return its loss weight."""
    weight = message.pop("weight", None)
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6:
            raise RowError(f"{where}: its weight is {weight!r}, expected a number of 0 or more")
        weight = float(weight)
    for key in TRAINED:
        trained = message.pop(key, None)
        if trained is None:
            continue
        if trained not in (0, 1) or not isinstance(trained, (bool, int, float)):
            raise RowError(f"{where}: {key!r} is {str(trained)[:40]!r}, expected true or false")
        if not trained:
            weight = 0.0
        elif weight is None:
            weight = 1.0
    for key in message:
        if re.search("mask|train|loss|weight|ignore", key, re.IGNORECASE):
            raise RowError(
                f"{where}: the key {key!r} is unknown and may affect training; use 'weight' instead, 0 for a message "
                f"that is not trained"
            )
    return weight


def _calls(message: Message, role: str, where: str) -> list[Message]:
    """Remove the tool calls from a message and return them: `tool_calls`, or OpenAI's older `function_call`."""
    calls = message.pop("tool_calls", None) or []
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RowError(f"{where}: 'tool_calls' is not a list of objects")
    if len(calls) > MOST:
        raise RowError(f"{where} has {len(calls)} tool calls; more than {MOST} are not supported")
    older = message.pop("function_call", None)
    if older is not None:
        if not isinstance(older, dict):
            raise RowError(
                f"{where}: 'function_call' is {json_type(older)}, expected an object with name and arguments"
            )
        if calls:
            raise RowError(f"{where} has both 'function_call' and 'tool_calls'; keep one of them")
        calls = [{"type": "function", "function": older}]
    if calls and role != "assistant":
        raise RowError(f"{where}: role {role} has tool calls; only the assistant can call a tool")
    return [_call(call, where) for call in calls]


def _call(call: Message, where: str) -> Message:
    """Put a tool call's name before its arguments, and decode arguments that are JSON in a string, as OpenAI's are."""
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _call(inner, where)}
    name, arguments = call.get("name"), call.get("arguments")
    if isinstance(arguments, str):
        arguments = parse(arguments, "the arguments of a tool call") if arguments.strip() else {}
    if arguments is None:
        if "parameters" in call:
            raise RowError(f"{where}: a tool call has 'parameters'; rename them to 'arguments'")
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"{where}: the arguments of a tool call are {json_type(arguments)}, expected an object")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where}: a tool call has no name")
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments") and value is not None}
    return {"name": name, "arguments": arguments, **rest}


def _content(message: Message, where: str, may_lack: bool) -> str:
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's content parts, of which only text is supported
        parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) < len(content):
            raise RowError(f"{where}: a part of its content is not text")
        return "".join(parts)
    if content is None and may_lack:
        return ""
    if not isinstance(content, str):
        raise RowError(
            f"{where}: its content is {json_type(content) if content is not None else 'missing'}, expected text"
        )
    return content


def _with_reasoning(message: Message, where: str) -> Message:
    """Copy reasoning to both keys that templates read, from whichever key the row has."""
    by_key = {key: message[key] for key in REASONING if key in message}
    if not by_key:
        return message
    is_text = all(isinstance(value, str) for value in by_key.values())
    texts = {text for text in by_key.values() if text != ""} if is_text else None
    if texts is None or len(texts) > 1:
        raise RowError(f"{where}: {' and '.join(by_key)} must be text, and the same text in each key")
    reasoning = next(iter(texts), "")
    return {**message, "reasoning_content": reasoning, "thinking": reasoning}


def has_reasoning(message: Message) -> bool:
    """Whether a converted message has reasoning that is not blank."""
    return bool(str(message.get("reasoning_content", "")).strip())
