"""Documents of JSON-lines and plain text files, told apart without decoding them: workers do that."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalite.text.rows import Line, decode, kind, parse_json, read_lines, text_fault


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
        if kind(file) not in (".jsonl", ".json", ".txt"):
            raise ValueError(f"{file}: unknown suffix {kind(file)!r}; name the input *.jsonl or *.txt, or add .gz")
        lines = read_lines(file)
        if kind(file) == ".txt":
            yield from _text_rows(file, lines, document_per)
        else:
            yield from (Row(*line, is_json=True) for line in lines if line.raw.strip())


def _text_rows(file: str | Path, lines: Iterable[Line], document_per: str) -> Iterator[Row]:
    if document_per == "file":
        yield Row(f"{file}:1", b"".join(line.raw for line in lines), False)
        return
    first, paragraph = "", list[bytes]()
    for where, raw in lines:
        blank = not raw.strip()
        if not blank:
            first = first if paragraph else where
            paragraph.append(raw)
        if paragraph and (blank or document_per == "line"):
            yield Row(first, b"".join(paragraph).rstrip(b"\r\n"), False)
            paragraph = []
    if paragraph:
        yield Row(first, b"".join(paragraph).rstrip(b"\r\n"), False)


def texts(row: Row, keys: Sequence[str]) -> list[str]:
    """The text under each key; ValueError says where and how the row is wrong."""
    try:
        return _from_json(row.raw, keys) if row.is_json else [_plain(row.raw, keys)]
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _plain(raw: bytes, keys: Sequence[str]) -> str:
    text = decode(raw)
    if len(keys) > 1:
        raise ValueError(f"plain text cannot hold {len(keys)} JSON keys; choose one key")
    if fault := text_fault(text):
        raise ValueError(fault)
    return text


def _from_json(raw: bytes, keys: Sequence[str]) -> list[str]:
    found = parse_json(raw)
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}, expected a JSON object")
    for key in keys:
        if key not in found:
            there = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"has no key {key!r}, its keys are {there}; preprocess_data.py --json-keys takes others")
        if not isinstance(found[key], str):
            raise ValueError(f"{key!r} is a {type(found[key]).__name__}, expected a string")
        if fault := text_fault(found[key]):
            raise ValueError(f"{key!r} {fault}")
    return [found[key] for key in keys]
