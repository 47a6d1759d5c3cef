"""Documents of JSON-lines and plain text files. Files are split here; workers decode the documents."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megalite.text.rows import Line, decode, file_suffix, json_type, parse_json, read_lines, text_fault


class Document(NamedTuple):
    """One undecoded document, a JSON object or plain text; `where` is file:line."""

    where: str
    raw: bytes
    is_json: bool


def read_documents(files: Sequence[str | Path], document_per: str = "paragraph") -> Iterator[Document]:
    """Yield the documents of .jsonl and .txt files, gzipped or not, in order.

    document_per: what a document is in plain text: `file`, `line`, or `paragraph`, which ends at a blank line.

    Raises ValueError for files that cannot be read and unknown suffixes.
    """
    for file in files:
        if file_suffix(file) not in (".jsonl", ".json", ".txt"):
            raise ValueError(
                f"{file}: unknown suffix {file_suffix(file)!r}; use .jsonl or .txt files, optionally with .gz"
            )
        lines = read_lines(file)
        if file_suffix(file) == ".txt":
            yield from _text_documents(file, lines, document_per)
        else:
            yield from (Document(*line, is_json=True) for line in lines if line.raw.strip())


def _text_documents(file: str | Path, lines: Iterable[Line], document_per: str) -> Iterator[Document]:
    if document_per == "file":
        yield Document(f"{file}:1", b"".join(line.raw for line in lines), False)
        return
    first, paragraph = "", list[bytes]()
    for where, raw in lines:
        blank = not raw.strip()
        if not blank:
            first = first if paragraph else where
            paragraph.append(raw)
        if paragraph and (blank or document_per == "line"):
            yield Document(first, b"".join(paragraph).rstrip(b"\r\n"), False)
            paragraph = []
    if paragraph:
        yield Document(first, b"".join(paragraph).rstrip(b"\r\n"), False)


def texts(document: Document, keys: Sequence[str]) -> list[str]:
    """Return the text of each key of a row. Raises ValueError with file, line and reason if the row is malformed."""
    try:
        return _from_json(document.raw, keys) if document.is_json else [_plain(document.raw, keys)]
    except ValueError as error:
        raise ValueError(f"{document.where}: {error}") from None


def _plain(raw: bytes, keys: Sequence[str]) -> str:
    text = decode(raw)
    if len(keys) > 1:
        raise ValueError(f"plain text has no JSON keys, but {len(keys)} are given; use one key")
    if fault := text_fault(text):
        raise ValueError(fault)
    return text


def _from_json(raw: bytes, keys: Sequence[str]) -> list[str]:
    found = parse_json(raw)
    if not isinstance(found, dict):
        raise ValueError(f"is {json_type(found)}, expected a JSON object")
    for key in keys:
        if key not in found:
            present = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"has no key {key!r}, its keys are {present}; choose keys with --json-keys")
        if not isinstance(found[key], str):
            raise ValueError(f"{key!r} is {json_type(found[key])}, expected text")
        if fault := text_fault(found[key]):
            raise ValueError(f"{key!r} {fault}")
    return [found[key] for key in keys]
