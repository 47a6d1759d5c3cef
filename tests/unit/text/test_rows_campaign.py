"""Fuzzed rows through every reader: all read the same texts and refuse the same rows.

Each row has the keys of all readers, so that all of them can read the same bytes.
"""

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from assets import asset
from campaign import rounds

from megalite.data.documents import read_documents, texts
from megalite.data.instructions import Options, write_indexed
from megalite.data.packing import Conversations
from megalite.data.preprocess import preprocess
from megalite.inference.eval_rows import read_clozes, read_questions
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.conversations import normalise
from megalite.text.conversations import read_rows as read_conversations
from megalite.text.messages import RowError
from megalite.text.tokenizer import Tokenizer, load_tokenizer

PIECES = [
    *(
        "a",
        "one two",
        " ",
        "\t",
        "\n",
        "\r",
        "\r\n",
        '"',
        "\\",
        "{",
        "[[",
        "</s>",
        "<|im_end|>",
        "{{ 7 * 7 }}",
        "🙂",
        "诗",
    ),
    *("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\ufeff", "\u200b", "\u3000", "\xa0"),
]
FAULTY = ["\0", "\ud800", "\udfff\ud800"]
OTHER_TYPES = [None, True, 3, -1.5, [], ["a"], {}, {"text": "a"}]
VALUES = ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1" * 5000, "-0", "[]", '"x"', "null"]
DEPTHS = [1, 10, 63, 64, 65, 66, 300, 900, 1100, 5000, 100_000]
BYTES = [
    b"\0",
    b"\xff",
    b"\xc3",
    b"\n",
    b"\r",
    b"\x0c",
    b"\x1c",
    b'"',
    b"}",
    b"{",
    b",",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
]
ReadPrompts = Callable[[Path], list[str]]
Outcome = tuple[list[str], int | None]


def fuzzed_text(draw: random.Random, faulty: float = 0.1) -> str:
    pieces = [draw.choice(PIECES) for _ in range(draw.randrange(8))]
    if draw.random() < faulty:
        pieces.insert(draw.randrange(len(pieces) + 1), draw.choice(FAULTY))
    return "".join(pieces)


def fuzzed_row(draw: random.Random) -> bytes:
    """A line of JSON, or nearly."""
    text: Any = draw.choice(OTHER_TYPES) if draw.random() < 0.1 else fuzzed_text(draw)
    row = {"prompt": text, "completion": "x", "answer": "x", "choices": ["x", "y"], "label": 0}
    keys = list(row)
    draw.shuffle(keys)
    members = [f"{json.dumps(key)}: {json.dumps(row[key], ensure_ascii=draw.random() < 0.5)}" for key in keys]
    kind = draw.randrange(20)
    if kind == 0:
        members.insert(draw.randrange(len(members)), f'"extra": {draw.choice(VALUES)}')
    elif kind == 1:
        depth, (left, right) = draw.choice(DEPTHS), draw.choice([("[", "]"), ('{"a":', "}")])
        members.append(f'"extra": {left * depth}{"1" if right == "}" else ""}{right * depth}')
    elif kind == 2:
        members.append(draw.choice(members))  # a key twice
    elif kind == 3:
        members = [member for member in members if not member.startswith('"prompt"')]
    line = ("{" + ", ".join(members) + "}").encode("utf-8", "surrogatepass")
    if kind == 4:
        line = draw.choice([b"[1]", b'"text"', b"17", b"null", b"[" * 100_000, b"{}", b"nul"])
    elif kind == 5:
        line = line[: draw.randrange(len(line))]
    elif kind == 6:
        # only in the text that all readers use, since other keys concern only some of them
        shared = next(each for each in members if each.startswith('"prompt"')).encode("utf-8", "surrogatepass")
        start = line.index(shared)
        at = draw.randrange(start + len(b'"prompt": '), start + len(shared))
        line = line[:at] + draw.choice(BYTES) + line[at + draw.randrange(2) :]
    elif kind == 7:
        line = (
            draw.choice([b" ", b"\t", b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbf", b"\x0c", b"\xc2\x85", b"\r"]) + line
        )
    elif kind == 8:
        line += draw.choice([b"\r", b" ", b"\x0b", b"\xe2\x80\xa8", b"}", b"\0", b" // no", b","])
    return line


def lines_of(draw: random.Random, make: Callable[[random.Random], bytes]) -> bytes:
    """A file of one to three lines, some of them blank."""
    rows = [draw.choice([b"", b" ", b"\t\r", make(draw)]) if draw.random() < 0.3 else make(draw) for _ in range(2)]
    return draw.choice([b"", b"\xef\xbb\xbf"]) + draw.choice([b"\n", b"\r\n"]).join(rows) + draw.choice([b"", b"\n"])


def outcome(path: Path, rows: Callable[[], Iterator[str]]) -> Outcome:
    """The texts up to the first row that is refused, and the number of its line."""
    found = list[str]()
    try:
        found.extend(rows())
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert "\n" not in message
        if "contains no" in message:
            return [], None
        # a file that starts as an array is refused without a line number
        number = message.removeprefix(f"{path}:").partition(":")[0]
        return [], int(number) if number.isdigit() else 1
    return found, None


def conversations(path: Path) -> Iterator[str]:
    for row in read_conversations(path):
        try:
            yield normalise(row.value).messages[0]["content"]
        except RowError as error:
            raise ValueError(f"{row.where}: {error}") from None


def readers(path: Path, packed: Path, read_prompts: ReadPrompts) -> dict[str, Outcome]:
    rows: dict[str, Callable[[], Iterator[str]]] = {
        "preprocess": lambda: (texts(row, ["prompt"])[0] for row in read_documents([path])),
        "tuning": lambda: conversations(path),
        "questions": lambda: (row.prompt for row in read_questions(path)),
        "choices": lambda: (row.prompt for row in read_clozes(path)),
        "prompts": lambda: iter(read_prompts(path)),
    }
    found = {name: outcome(path, each) for name, each in rows.items()}
    packed.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
    found["gzip"] = outcome(packed, lambda: (texts(row, ["prompt"])[0] for row in read_documents([packed])))
    return found


def test_all_readers_accept_and_refuse_the_same_rows(
    tmp_path: Path, read_prompts: ReadPrompts, capsys: pytest.CaptureFixture[str]
) -> None:
    counts, path = Counter[str](), tmp_path / "in.jsonl"
    for seed in range(rounds(150, 1000)):
        draw = random.Random(seed)
        path.write_bytes(lines_of(draw, fuzzed_row))
        found = readers(path, tmp_path / "in.jsonl.gz", read_prompts)
        assert len(set(map(repr, found.values()))) == 1, (seed, path.read_bytes()[:400], found)
        texts_read, bad = found["preprocess"]
        counts["refused by name" if bad else "read alike" if texts_read else "empty"] += 1
    with capsys.disabled():
        print(f"\nrows of JSON lines: {dict(sorted(counts.items()))}")
    assert min(counts["refused by name"], counts["read alike"]) > 0.2 * counts.total()


def test_lines_of_text_are_the_same_documents_and_prompts(
    tmp_path: Path, read_prompts: ReadPrompts, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(draw: random.Random) -> bytes:
        text = fuzzed_text(draw).encode("utf-8", "surrogatepass")
        at = draw.randrange(len(text) + 1)
        return text[:at] + (draw.choice(BYTES) if draw.random() < 0.3 else b"") + text[at:]

    counts, path, packed = Counter[str](), tmp_path / "in.txt", tmp_path / "in.txt.gz"
    for seed in range(rounds(150, 1000)):
        path.write_bytes(lines_of(random.Random(seed), line))
        packed.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
        found = [
            outcome(path, lambda: (texts(row, ["prompt"])[0] for row in read_documents([path], "line"))),
            outcome(packed, lambda: (texts(row, ["prompt"])[0] for row in read_documents([packed], "line"))),
            outcome(path, lambda: iter(read_prompts(path))),
        ]
        assert found[0] == found[1] == found[2], (seed, path.read_bytes(), found)
        counts["refused by name" if found[0][1] else "read alike" if found[0][0] else "empty"] += 1
    with capsys.disabled():
        print(f"\nlines of text: {dict(sorted(counts.items()))}")


def test_lines_arrays_and_tables_are_the_same_conversations(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    draw = random.Random(0)
    rows = [{"prompt": fuzzed_text(draw, faulty=0), "completion": "x"} for _ in range(rounds(150, 1000))]
    rows[7]["prompt"] = "a\0"
    lines, array, table = (tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet"))
    lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    array.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    found = [list(read_conversations(path)) for path in (lines, array, table)]
    assert all([row.value for row in each] == rows for each in found)
    assert [row.where.removeprefix(str(tmp_path)) for each in found for row in each[7:8]] == [
        "/a.jsonl:8",
        "/b.json:row 8",
        "/c.parquet:row 8",
    ]
    for each in found:
        with pytest.raises(RowError, match="prompt contains a NUL"):
            normalise(each[7].value)


def test_damaged_tables_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    binary = pyarrow.array([b"ok", b"\xff\xfe", b"fine"])
    text = pyarrow.StringArray.from_buffers(3, *binary.buffers()[1:])
    parquet.write_table(pyarrow.table({"prompt": text, "completion": ["x"] * 3}), path)
    found = [row.value for row in read_conversations(path)]
    assert [found[0]["prompt"], found[2]["prompt"]] == ["ok", "fine"]
    assert str(found[1]) == "not UTF-8 (invalid start byte at byte 0); write it as UTF-8"
    parquet.write_table(pyarrow.table({"prompt": ["a"] * 3, "completion": ["x"] * 3}), path)
    whole, counts = path.read_bytes(), Counter[str]()
    for seed in range(rounds(100, 1000)):
        draw, damaged = random.Random(seed), bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged[: draw.randrange(len(whole))] if draw.random() < 0.1 else damaged)
        counts["refused by name" if outcome(path, lambda: conversations(path))[1] else "read"] += 1
    with capsys.disabled():
        print(f"\ndamaged Parquet files: {dict(sorted(counts.items()))}")


def test_whole_files_skip_the_same_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """With bad rows skipped, preprocessing with any number of workers and tuning keep the same rows."""
    path, draw = tmp_path / "all.jsonl", random.Random(1)
    rows = [line for line in (fuzzed_row(draw) for _ in range(rounds(150, 1000))) if b"\n" not in line and line.strip()]
    good = b'{"prompt": "a", "completion": "x"}'  # a file that begins with [ is one array
    path.write_bytes(b"\n".join([good, *rows]))
    reports = [
        preprocess([path], tmp_path / f"by{workers}", tokenizer, workers=workers, skip_bad_rows=True, keys=["prompt"])
        for workers in (1, 2)
    ]
    assert reports[0].bad_rows == reports[1].bad_rows
    assert len(reports[0].bad_rows) > 0.2 * len(rows)
    made = [tmp_path / f"by{workers}_prompt_document.bin" for workers in (1, 2)]
    assert made[0].read_bytes() == made[1].read_bytes()
    smollm2 = load_tokenizer(asset("smollm2"))
    template = ChatTemplate(*find_template("chatml", smollm2), smollm2)
    report = write_indexed(path, tmp_path / "chats", smollm2, template, Options(bad_rows="skip"))
    assert [line.split(": ")[0] for line in report.bad] == [line.split(": ")[0] for line in reports[0].bad_rows]
    kept = len(Conversations(tmp_path / "chats").lengths)
    assert kept == reports[0].written[0].documents + reports[0].empty == len(rows) + 1 - len(report.bad)
