"""The one reader of lines and JSON rows: what a line is, and which JSON is accepted.

Only a line feed ends a line. `str.splitlines` would also split a text at U+2028, U+0085 or a form feed.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Python's own limit depends on the depth of the call stack, so a row could pass in one place and fail in another.
DEEPEST = 64


class Line(NamedTuple):
    """One undecoded line, with its line ending; `where` is file:line."""

    where: str
    raw: bytes


def file_suffix(path: str | Path) -> str:
    """The suffix of a file name, ignoring a final .gz."""
    file = Path(path)
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def read_lines(path: str | Path) -> Iterator[Line]:
    """Yield the lines of a file, gzipped or not, without a leading byte order mark.

    Raises ValueError if there is no such file or its gzip data is damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: {'is a folder; name a file' if file.is_dir() else 'no such file'}")
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield Line(f"{file}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: damaged gzip file ({error}); copy or compress it again") from error


def nonblank_lines(path: str | Path) -> Iterator[Line]:
    """Yield the lines of a file that contain more than whitespace."""
    return (line for line in read_lines(path) if line.raw.strip())


def decode(raw: bytes) -> str:
    """Decode UTF-8. Raises ValueError with the remedy if the bytes are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}); convert the file to UTF-8") from None


def parse_json(raw: bytes, deepest: int | None = DEEPEST) -> Any:
    """Parse one row of JSON.

    deepest: the allowed levels of nesting; None: as many as Python can parse.

    Raises ValueError if the row is not UTF-8, not JSON (NotJSONError), nested too deeply, or has an object with a
    duplicate key (DuplicateKeyError).
    """
    # files joined by `cat` can have a byte order mark on any line
    text = decode(raw.removeprefix(codecs.BOM_UTF8)).rstrip(" \t\r\n")  # else an error at the end is on the next line
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise NotJSONError(f"not JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except DuplicateKeyError:
        raise
    except ValueError:
        raise ValueError("not JSON (a number has thousands of digits)") from None
    if deepest is not None and text.count("[") + text.count("{") > deepest and _is_deeper(value, deepest):
        raise ValueError(f"not JSON (nested too deeply: more than {deepest} levels)")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that is one JSON object. Raises ValueError if it is damaged or holds another type."""
    try:
        found = parse_json(path.read_bytes(), deepest=None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the file is damaged, write it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is {json_type(found)}, expected a JSON object; write it again")
    return found


class NotJSONError(ValueError):
    """Text that is not valid JSON."""


class DuplicateKeyError(ValueError):
    """A JSON object that has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKeyError(f"key {twice!r} appears twice in one object; keep one of them")
    return found


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep. Not recursive, since the value may be very deep."""
    here = [value]
    for _ in range(levels + 1):
        inner = list[Any]()
        for each in here:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        here = inner
    return bool(here)


def json_type(value: Any) -> str:
    """The JSON type of a value with its article, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def text_fault(text: str) -> str | None:
    """Return why a text cannot be tokenized and written as UTF-8, or None if it can."""
    if "\0" in text:
        return "contains a NUL character; remove it, or convert the file to UTF-8 if it is UTF-16"
    # JSON can encode a lone surrogate, UTF-8 cannot
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return "contains half a surrogate pair, which is not valid in UTF-8; remove it"
    return None
