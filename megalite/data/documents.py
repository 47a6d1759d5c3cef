"""Documents of JSON-lines and plain text files, told apart without decoding them: workers do that."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One undecoded document: a JSON object, or its plain text; `where` is file:line."""

    where: str
    raw: bytes
    is_json: bool


def read_rows(files: Sequence[str | Path], document_per: str = "paragraph") -> Iterator[Row]:
    """Documents of .jsonl and .txt files (or .gz of either), in order.

    document_per: `file`, `line` or `paragraph` (ended by a blank line), for plain text.
    """
    for file in files:
        path = Path(file)
        kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
        if kind not in (".jsonl", ".json", ".txt"):
            raise ValueError(f"{path}: unknown suffix {kind!r}; name the input *.jsonl or *.txt, or either with .gz")
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        lines = _lines(path)
        yield from _json_rows(path, lines) if kind != ".txt" else _text_rows(path, lines, document_per)


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for number, line in enumerate(stream):
                yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); copy or compress it again") from error


def _json_rows(path: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Row(f"{path}:{number}", line, True)


def _text_rows(path: Path, lines: Iterable[bytes], document_per: str) -> Iterator[Row]:
    if document_per == "file":
        yield Row(f"{path}:1", b"".join(lines), False)
        return
    first, paragraph = 1, list[bytes]()
    for number, line in enumerate(lines, start=1):
        blank = not line.strip()
        if not blank:
            first = first if paragraph else number
            paragraph.append(line)
        if paragraph and (blank or document_per == "line"):
            yield Row(f"{path}:{first}", b"".join(paragraph).rstrip(b"\r\n"), False)
            paragraph = []
    if paragraph:
        yield Row(f"{path}:{first}", b"".join(paragraph).rstrip(b"\r\n"), False)


def texts(row: Row, keys: Sequence[str]) -> list[str]:
    """The text under each key; ValueError says where and how the row is wrong."""
    try:
        text = row.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{row.where}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
    if not row.is_json:
        if len(keys) > 1:
            raise ValueError(f"{row.where}: plain text cannot hold {len(keys)} JSON keys; choose one key")
        return [text]
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{row.where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{row.where}: holds a {type(found).__name__}, expected a JSON object")
    for key in keys:
        if key not in found:
            there = ", ".join(map(repr, found)) or "none"
            raise ValueError(
                f"{row.where}: has no key {key!r}, its keys are {there}; preprocess_data.py --json-keys takes others"
            )
        if not isinstance(found[key], str):
            raise ValueError(f"{row.where}: {key!r} is a {type(found[key]).__name__}, expected a string")
        # A lone surrogate is valid JSON but no text.
        if not found[key].isascii() and re.search("[\ud800-\udfff]", found[key]):
            raise ValueError(f"{row.where}: {key!r} holds half a surrogate pair, which no UTF-8 text can")
    return [found[key] for key in keys]
