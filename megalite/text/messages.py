"""The messages of one conversation as every reader and template of the project knows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from megalite.text.rows import NotJSONError, parse_json

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
MOST = 10_000  # messages of a row, and tool calls of a message
# noncharacters of Unicode that no text may hold: chat templates are rendered with them around what is looked for
RESERVED = re.compile("[\ufdd0-\ufdef]")
# names under which chat templates and data sets keep what the model thinks before it answers
REASONING = ("reasoning_content", "thinking", "reasoning")
# true or false, one or zero: whether a message is trained (Hugging Face and axolotl, ms-swift)
TRAINED = ("train", "training", "loss")


class RowError(ValueError):
    """What is wrong with one row, without where it stands."""


@dataclass(frozen=True)
class Conversation:
    """`messages`: each with a role of ROLES and `content`, text; those of the assistant may have `tool_calls`.

    `weights`: of each message in the loss, None where the row says nothing. `tools`: JSON schemas, as given.
    """

    format: str
    messages: list[Message]
    weights: list[float | None]
    tools: list[Any] | None = field(default=None)


def conversation(name: str, given: list[Any], tools: list[Any] | None) -> Conversation:
    """Messages in OpenAI's form, old or new, checked and brought into one; RowError says which is wrong."""
    if len(given) > MOST:
        raise RowError(f"has {len(given)} messages; more than {MOST} in one row are not supported")
    messages, weights = [], []
    for number, message in enumerate(given, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{where} is {kind_of(message)}, expected an object with role and content")
        kept = {key: value for key, value in message.items() if value is not None}
        weights.append(_weight(kept, where))
        role = "tool" if kept.get("role") == "function" else kept.get("role")
        if role not in ROLES:
            shown = f"{role[:40]!r}" if isinstance(role, str) else "missing" if role is None else kind_of(role)
            raise RowError(f"{where}: its role is {shown}, expected {', '.join(ROLES)}")
        calls = _calls(kept, role, where)
        kept |= {"role": role, "content": _content(kept, where, may_lack=bool(calls))}
        if calls:
            kept["tool_calls"] = calls
        messages.append(_with_reasoning(kept, where) if role == "assistant" else kept)
    return Conversation(name, messages, weights, tools)


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def parse(text: str, what: str) -> Any:
    """The value of JSON that stands in a string; RowError names `what` it is."""
    try:
        return parse_json(text.encode())
    except NotJSONError:
        raise RowError(f"{what} is not JSON: {text[:60]!r}") from None
    except ValueError as error:
        raise RowError(f"{what}: {error}") from None


def _weight(message: Message, where: str) -> float | None:
    """What a message counts in the loss, taken out of it."""
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
                f"{where}: what {key!r} means for training is not known; write 'weight', 0 for a message that is not "
                f"trained"
            )
    return weight


def _calls(message: Message, role: str, where: str) -> list[Message]:
    """The tool calls of a message, taken out of it: OpenAI's list, or the one `function_call` before it."""
    calls = message.pop("tool_calls", None) or []
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RowError(f"{where}: 'tool_calls' is no list of objects")
    if len(calls) > MOST:
        raise RowError(f"{where} has {len(calls)} tool calls; more than {MOST} are not supported")
    older = message.pop("function_call", None)
    if older is not None:
        if not isinstance(older, dict):
            raise RowError(f"{where}: 'function_call' is {kind_of(older)}, expected an object with name and arguments")
        if calls:
            raise RowError(f"{where} has both 'function_call' and 'tool_calls'; keep one of them")
        calls = [{"type": "function", "function": older}]
    if calls and role != "assistant":
        raise RowError(f"{where}: a message of role {role} has tool calls; only the assistant can call a tool")
    return [_call(call, where) for call in calls]


def _call(call: Message, where: str) -> Message:
    """A tool call with its name before its arguments, and these an object: OpenAI writes them as JSON in a string."""
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
        raise RowError(f"{where}: the arguments of a tool call are {kind_of(arguments)}, expected an object")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where}: a tool call has no name")
    rest = {key: value for key, value in call.items() if key not in ("name", "arguments") and value is not None}
    return {"name": name, "arguments": arguments, **rest}


def _content(message: Message, where: str, may_lack: bool) -> str:
    content = message.get("content")
    if isinstance(content, list):  # OpenAI's parts, of which text is the kind a language model reads
        parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if len(parts) < len(content):
            raise RowError(f"{where}: a part of its content is no text")
        return "".join(parts)
    if content is None and may_lack:
        return ""
    if not isinstance(content, str):
        raise RowError(
            f"{where}: its content is {kind_of(content) if content is not None else 'missing'}, expected text"
        )
    return content


def _with_reasoning(message: Message, where: str) -> Message:
    """Templates read reasoning under one of two names; both are filled from whichever the row has."""
    given = {key: message[key] for key in REASONING if key in message}
    if not given:
        return message
    texts = {text for text in given.values() if text != ""} if all(isinstance(x, str) for x in given.values()) else None
    if texts is None or len(texts) > 1:
        raise RowError(f"{where}: {' and '.join(given)} must be one and the same text")
    reasoning = next(iter(texts), "")
    return {**message, "reasoning_content": reasoning, "thinking": reasoning}


def has_reasoning(message: Message) -> bool:
    return bool(str(message.get("reasoning_content", "")).strip())
