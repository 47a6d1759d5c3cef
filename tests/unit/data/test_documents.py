import gzip
from pathlib import Path

import pytest

from megalite.data.documents import Document, read_documents, texts


def read(path: Path, keys: tuple[str, ...] = ("text",), document_per: str = "paragraph") -> list[list[str]]:
    return [texts(row, keys) for row in read_documents([path], document_per)]


def test_json_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a\\nb", "title": "t"}\n\n{"title": "u", "text": "诗"}', encoding="utf-8")
    assert read(path) == [["a\nb"], ["诗"]]
    assert read(path, ("title", "text")) == [["t", "a\nb"], ["u", "诗"]]
    assert [row.where for row in read_documents([path])] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("document_per", "documents", "lines"),
    [
        ("paragraph", ["a\nb", "c"], [2, 5]),
        ("line", ["a", "b", "c"], [2, 3, 5]),
        ("file", ["\na\nb\n \nc\n\n"], [1]),
    ],
)
def test_plain_text(tmp_path: Path, document_per: str, documents: list[str], lines: list[int]):
    path = tmp_path / "a.txt"
    path.write_text("\na\nb\n \nc\n\n")
    assert read(path, document_per=document_per) == [[each] for each in documents]
    assert [row.where for row in read_documents([path], document_per)] == [f"{path}:{line}" for line in lines]


def test_gzip_reads_the_same(tmp_path: Path):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text("a\nb\n\nc")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(plain) == read(packed) == [["a\nb"], ["c"]]
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"b\.txt\.gz: damaged gzip file"):
        read(packed)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": ', "not JSON"),
        (b"[1]", "is a list, expected a JSON object"),
        (b'{"body": "a"}', "has no key 'text'"),
        (b'{"text": 3}', "'text' is a number, expected text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 10\)"),
    ],
)
def test_bad_rows(raw: bytes, message: str):
    with pytest.raises(ValueError, match=f"^a.jsonl:7: .*{message}"):
        texts(Document("a.jsonl:7", raw, True), ["text"])


def test_plain_text_has_one_key():
    with pytest.raises(ValueError, match="plain text has no JSON keys, but 2 are given"):
        texts(Document("a.txt:1", b"a", False), ["a", "b"])


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a\.txt: no such file"):
        read(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a\.csv: unknown suffix '\.csv'"):
        read(tmp_path / "a.csv")
