"""Instruction data in the formats people have it in, as one: a list of messages with roles.

Told apart by their keys, row by row: `messages` (OpenAI, TRL), `conversations` (ShareGPT), `instruction` (Alpaca),
`prompt` with `completion`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.data.rows import DEEPEST, NotJSONError, filled_lines, parse_json, text_fault

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's names of them
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
# Unicode's noncharacters, which no text may have: chat templates mark the spans of the assistant with them
OPEN, CLOSE = "\ufdd0", "\ufdd1"

Message = dict[str, Any]


class RowError(ValueError):
    """What is wrong with one row, without where it stands."""


@dataclass(frozen=True)
class Row:
    """One row of a file: `where` is file:line; `value` is what JSON or Parquet gave, or why it gave nothing."""

    where: str
    value: Any | RowError


@dataclass(frozen=True)
class Conversation:
    """`messages`: each with a role of ROLES and `content`, text; those of the assistant may have `tool_calls`.

    `weights`: of each message in the loss, None where the row says nothing. `tools`: JSON schemas, as given.
    """

    format: str
    messages: list[Message]
    weights: list[float | None]
    tools: list[Any] | None = field(default=None)


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a .jsonl or .json file (lines, or one array) or a .parquet file, in order."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{file}: {what}; instruction data is a .jsonl, .json or .parquet file")
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{file}: unknown suffix {file.suffix!r}; instruction data is .jsonl, .json or .parquet")
    elif _is_array(file):
        found = _json(file.read_bytes(), deepest=None)  # the rows are looked at one by one
        if isinstance(found, RowError):
            raise ValueError(f"{file}: {found}; it begins with '[', so all of it has to be one JSON array")
        yield from (Row(f"{file}:row {number}", value) for number, value in enumerate(found, start=1))
    else:
        yield from (Row(line.where, _json(line.raw)) for line in filled_lines(file))


def _is_array(file: Path) -> bool:
    """Whether a file is one JSON array; a .jsonl whose first row is an array by mistake is not."""
    first = next(filled_lines(file), None)
    if first is None or not first.raw.lstrip().startswith(b"["):
        return False
    try:
        parse_json(first.raw)
    except NotJSONError:
        return True
    except ValueError:
        pass
    return file.suffix == ".json"


def _json(text: bytes, deepest: int | None = DEEPEST) -> Any | RowError:
    try:
        return parse_json(text, deepest)
    except ValueError as error:
        return RowError(str(error))


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs pyarrow; pip install 'megalite[sft]'") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in _values(batch):
                number += 1
                yield Row(f"{file}:row {number}", _without_nulls(value))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from error


def _values(batch: Any) -> list[Any]:
    """The rows of a batch; those whose text is not UTF-8 as RowErrors."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowError(f"not UTF-8 ({error.reason} at byte {error.start}); write it as UTF-8")]
        return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object the keys of all rows: a null is a key that this one does not have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def normalise(row: Any) -> Conversation:
    """The conversation of one row; RowError says how the row is wrong."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"is {_kind(row)}, expected an object")
    _check_text(row, "row", 0)
    for key, read in READERS.items():
        if row.get(key) is not None:
            found = read(row)
            break
    else:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise RowError(f"has none of the keys {', '.join(READERS)} that tell a format; its keys are {keys}")
    if not found.messages:
        raise RowError("holds no message")
    if not any(message["role"] == "assistant" for message in found.messages):
        raise RowError("has no message of the assistant: there is nothing to train on")
    return found


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _check_text(value: Any, name: str, depth: int) -> None:
    if depth > DEEPEST:
        raise RowError(f"{name} is nested more than {DEEPEST} deep")
    if isinstance(value, str):
        if fault := text_fault(value):
            raise RowError(f"{name} {fault}")
        if OPEN in value or CLOSE in value:
            raise RowError(f"{name} holds U+FDD0 or U+FDD1, which Unicode reserves for programs; remove it")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, f"a key of {name}", depth + 1)
            _check_text(item, key if name == "row" else name, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_text(item, name, depth + 1)


def _text(row: dict[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise RowError(f"{key!r} is " + (f"{_kind(value)}, expected text" if key in row else "missing"))
    return value


def _list(row: dict[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is " + (f"{_kind(value)}, expected a list" if key in row else "missing"))
    return value


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse(tools, "'tools'") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError(f"'tools' is {_kind(tools)}, expected a list of JSON schemas")
    return tools or None


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{what} is not JSON: {text[:60]!r}") from None


def _messages(row: dict[str, Any]) -> Conversation:
    return _conversation("messages", _list(row, "messages"), _tools(row))


def _conversation(name: str, given: list[Any], tools: list[Any] | None) -> Conversation:
    messages, weights = [], []
    for number, message in enumerate(given, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise RowError(f"{where} is {_kind(message)}, expected an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            shown = f"{role[:40]!r}" if isinstance(role, str) else "missing" if role is None else _kind(role)
            raise RowError(f"{where}: its role is {shown}, expected {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise RowError(f"{where}: 'tool_calls' is no list of objects")
        kept = {key: value for key, value in message.items() if key != "weight" and value is not None}
        kept |= {"role": role, "content": _content(message, where, may_lack=bool(calls))}
        if calls:
            kept["tool_calls"] = [_with_arguments(call) for call in calls]
        messages.append(kept)
        weights.append(_weight(message.get("weight"), where))
    return Conversation(name, messages, weights, tools)


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object: OpenAI writes them as JSON in a string, templates want the object."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        return {**call, "arguments": _parse(arguments, "the arguments of a tool call")}
    return call


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
        raise RowError(f"{where}: its content is {_kind(content) if content is not None else 'missing'}, expected text")
    return content


def _weight(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 <= value < 1e6:
        raise RowError(f"{where}: its weight is {value!r}, expected a number of 0 or more")
    return float(value)


def _sharegpt(row: dict[str, Any]) -> Conversation:
    given = _list(row, "conversations")
    system = _text(row, "system", "")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(given, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number} is {_kind(turn)}, expected an object with from and value")
        if "role" in turn and "from" not in turn:
            messages.append(turn)  # some name the list conversations and write it as messages
            continue
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise RowError(f"message {number}: 'from' is {str(speaker)[:40]!r}, expected {', '.join(SPEAKERS)}")
        message = {"role": SPEAKERS[speaker], "content": turn.get("value"), "weight": turn.get("weight")}
        if speaker == "function_call":
            calls = _parse(_text(turn, "value"), f"message {number}: the function call")
            calls = calls if isinstance(calls, list) else [calls]
            if not all(isinstance(call, dict) and "name" in call for call in calls):
                raise RowError(f"message {number}: the function call has no name")
            message["content"] = None
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        messages.append(message)
    return _conversation("ShareGPT", messages, _tools(row))


def _alpaca(row: dict[str, Any]) -> Conversation:
    messages = []
    if system := _text(row, "system", ""):
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(_list(row, "history") if row.get("history") else [], start=1):
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RowError(f"turn {number} of its history is no pair of an instruction and an answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = "\n".join(filter(None, (_text(row, "instruction"), _text(row, "input", ""))))
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]
    return _conversation("Alpaca", messages, None)


def _completion(row: dict[str, Any]) -> Conversation:
    if isinstance(row["prompt"], list):  # TRL's conversational form: both are lists of messages
        prompt = _conversation("prompt/completion", _list(row, "prompt"), _tools(row))
        answer = _conversation("prompt/completion", _list(row, "completion"), None)
        weights = [0.0] * len(prompt.messages) + answer.weights
        return Conversation("prompt/completion", prompt.messages + answer.messages, weights, prompt.tools)
    question, answer_text = _text(row, "prompt"), _text(row, "completion")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer_text}]
    return _conversation("prompt/completion", messages, None)


READERS = {"messages": _messages, "conversations": _sharegpt, "instruction": _alpaca, "prompt": _completion}
