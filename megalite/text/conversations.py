"""Reads instruction data in its common formats and converts each row to a list of messages with roles.

The keys of a row determine its format: `messages` (OpenAI, TRL), `conversations` (ShareGPT), `instruction` (Alpaca),
`prompt` with `completion`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.text.messages import RESERVED, Conversation, Message, RowError, conversation, parse
from megalite.text.rows import DEEPEST, NotJSONError, json_type, nonblank_lines, parse_json, text_fault

# ShareGPT's names of roles
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Row:
    """One row of a file: `where` is file:line; `value` is the decoded row, or the error that decoding it raised."""

    where: str
    value: Any | RowError


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl or .json file (lines, or one array) or a .parquet file, in order.

    Raises ValueError if the file cannot be read; a damaged row is a Row whose value is a RowError.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "no such file"
        raise ValueError(f"{file}: {what}; instruction data is a .jsonl, .json or .parquet file")
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{file}: unknown suffix {file.suffix!r}; instruction data is .jsonl, .json or .parquet")
    elif _is_array(file):
        rows = _json(file.read_bytes(), deepest=None)  # `normalise` checks the depth of each row
        if isinstance(rows, RowError):
            raise ValueError(f"{file}: {rows}; it starts with '[', so the whole file must be one JSON array")
        yield from (Row(f"{file}:row {number}", value) for number, value in enumerate(rows, start=1))
    else:
        yield from (Row(line.where, _json(line.raw)) for line in nonblank_lines(file))


def _is_array(file: Path) -> bool:
    """Whether a file is one JSON array. A .jsonl file whose first row is an array by mistake is not."""
    first = next(nonblank_lines(file), None)
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
    """The rows of a batch; a row whose text is not UTF-8 becomes a RowError."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowError(f"not UTF-8 ({error.reason} at byte {error.start}); write it as UTF-8")]
        return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]


def _without_nulls(value: Any) -> Any:
    """Remove nulls: Arrow adds the keys of all rows to every object, so a null is a missing key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def normalise(row: Any) -> Conversation:
    """Convert one decoded row to a conversation. Raises RowError if the row is malformed."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise RowError(f"is {json_type(row)}, expected an object")
    _check_text(row, "row", 0)
    for key, read in READERS.items():
        if row.get(key) is not None:
            found = read(row)
            break
    else:
        keys = ", ".join(map(repr, list(row)[:8])) or "none"
        raise RowError(f"has none of the keys {', '.join(READERS)} of the known formats; its keys are {keys}")
    if not found.messages:
        raise RowError("has no messages")
    # JSON inside strings has been decoded since the first check
    _check_text([message.get("tool_calls") for message in found.messages], "a tool call", 0)
    _check_text(found.tools, "'tools'", 0)
    if not any(message["role"] == "assistant" for message in found.messages):
        raise RowError("has no assistant message, so there is nothing to train on")
    return found


def _check_text(value: Any, name: str, depth: int) -> None:
    if depth > DEEPEST:
        raise RowError(f"{name} is nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        if fault := text_fault(value):
            raise RowError(f"{name} {fault}")
        if found := RESERVED.search(value):
            raise RowError(f"{name} contains U+{ord(found[0]):04X}, which Unicode reserves for programs; remove it")
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
        raise RowError(f"{key!r} is " + (f"{json_type(value)}, expected text" if key in row else "missing"))
    return value


def _list(row: dict[str, Any], key: str) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise RowError(f"{key!r} is " + (f"{json_type(value)}, expected a list" if key in row else "missing"))
    return value


def _tools(row: dict[str, Any]) -> list[Any] | None:
    """The JSON schemas of a row: `tools`, or OpenAI's older `functions`."""
    key = "functions" if row.get("tools") is None else "tools"
    tools = row.get(key)
    if isinstance(tools, str):
        tools = parse(tools, f"{key!r}") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError(f"{key!r} is {json_type(tools)}, expected a list of JSON schemas")
    if tools and key == "functions":
        tools = [{"type": "function", "function": tool} for tool in tools]
    return tools or None


def _messages(row: dict[str, Any]) -> Conversation:
    return conversation("messages", _with_system(row, _list(row, "messages")), _tools(row))


def _with_system(row: dict[str, Any], messages: list[Any]) -> list[Any]:
    """Prepend the row's `system` text to its messages."""
    system = _text(row, "system", "")
    if not system:
        return messages
    if any(isinstance(message, dict) and message.get("role", message.get("from")) == "system" for message in messages):
        raise RowError("has 'system' and also a message of role system; keep one of them")
    return [{"role": "system", "content": system}, *messages]


def _sharegpt(row: dict[str, Any]) -> Conversation:
    messages = []
    for number, turn in enumerate(_list(row, "conversations"), start=1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number} is {json_type(turn)}, expected an object with from and value")
        if "role" in turn and "from" not in turn:
            messages.append(turn)  # some data sets put OpenAI messages into `conversations`
            continue
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise RowError(f"message {number}: 'from' is {str(speaker)[:40]!r}, expected {', '.join(SPEAKERS)}")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        message = {**rest, "role": SPEAKERS[speaker], "content": turn.get("value")}
        if speaker == "function_call":
            calls = parse(_text(turn, "value"), f"message {number}: the function call")
            calls = calls if isinstance(calls, list) else [calls]
            if not all(isinstance(call, dict) and "name" in call for call in calls):
                raise RowError(f"message {number}: the function call has no name")
            message["content"] = None
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        messages.append(message)
    return conversation("ShareGPT", _with_system(row, messages), _tools(row))


def _alpaca(row: dict[str, Any]) -> Conversation:
    messages: list[Message] = []
    if system := _text(row, "system", ""):
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(_list(row, "history") if row.get("history") else [], start=1):
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RowError(f"turn {number} of 'history' is not a pair of an instruction and an answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    instruction, extra = _text(row, "instruction"), _text(row, "input", "")
    question: Message = {"role": "user", "content": "\n".join(filter(None, (instruction, extra)))}
    if extra:  # Alpaca's own prompt shows the two separately
        question |= {"instruction": instruction, "input": extra}
    messages += [question, {"role": "assistant", "content": _text(row, "output")}]
    return conversation("Alpaca", messages, None)


def _completion(row: dict[str, Any]) -> Conversation:
    if isinstance(row["prompt"], list):  # TRL's conversational form: both are lists of messages
        prompt = conversation("prompt/completion", _list(row, "prompt"), _tools(row))
        answer = conversation("prompt/completion", _list(row, "completion"), None)
        weights = [0.0] * len(prompt.messages) + answer.weights
        return Conversation("prompt/completion", prompt.messages + answer.messages, weights, prompt.tools)
    question, answer_text = _text(row, "prompt"), _text(row, "completion")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer_text}]
    return conversation("prompt/completion", messages, None)


READERS = {"messages": _messages, "conversations": _sharegpt, "instruction": _alpaca, "prompt": _completion}
