"""Rows of text and JSON-lines files, read in one way everywhere: what a line is, and which JSON a row may be.

Lines end at a line feed alone. `str.splitlines` would also cut a text at U+2028, U+0085 or a form feed in it.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Python's own limit depends on how deep the caller stands, so that a row could pass here and be refused there.
DEEPEST = 64


class Line(NamedTuple):
    """One undecoded line with its end; `where` is file:line."""

    where: str
    raw: bytes


def kind(path: str | Path) -> str:
    """The suffix of a file, without the .gz of a compressed one."""
    file = Path(path)
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def read_lines(path: str | Path) -> Iterator[Line]:
    """The lines of a file, .gz or not, without the byte order mark at its beginning."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: {'is a folder; name a file' if file.is_dir() else 'no such file'}")
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield Line(f"{file}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: damaged gzip file ({error}); copy or compress it again") from error


def filled_lines(path: str | Path) -> Iterator[Line]:
    """The lines that hold more than white space."""
    return (line for line in read_lines(path) if line.raw.strip())


def decode(raw: bytes) -> str:
    """The text of UTF-8; ValueError where it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}); convert the file to UTF-8") from None


def parse_json(raw: bytes, deepest: int | None = DEEPEST) -> Any:
    """The value of a row of JSON; ValueError says what is wrong with it.

    A key that stands twice in an object is refused: which of the two is meant is unknown. `deepest` None: only what
    Python cannot read is nested too deeply.
    """
    # files joined by `cat` have a byte order mark at the beginning of each
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
    if deepest is not None and text.count("[") + text.count("{") > deepest and _deeper(value, deepest):
        raise ValueError(f"not JSON (nested too deeply: more than {deepest} levels)")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file is; ValueError where it is none."""
    try:
        found = parse_json(path.read_bytes(), deepest=None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the file is damaged, write it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a JSON object; write it again")
    return found


class NotJSONError(ValueError):
    """Text that breaks JSON's grammar."""


class DuplicateKeyError(ValueError):
    """A key that stands twice in one JSON object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKeyError(f"key {twice!r} is written twice in one object; keep one of them")
    return found


def _deeper(value: Any, levels: int) -> bool:
    """Whether a value lies under more than so many lists and objects; without recursion, as it may be very deep."""
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


def text_fault(text: str) -> str | None:
    """Why a text cannot be tokenized and written as UTF-8; None: it can."""
    if "\0" in text:
        return "holds a NUL character; remove it, or convert the file to UTF-8 if it is UTF-16"
    # a lone surrogate is valid JSON but no text
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return "holds half a surrogate pair, which no UTF-8 text can; remove it"
    return None
