"""What a line is and which JSON is accepted; test_rows_campaign checks that all readers of rows agree."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.data.preprocess import preprocess
from megalite.inference.eval_rows import read_clozes, read_questions
from megalite.text.conversations import read_rows as read_conversations
from megalite.text.messages import RowError
from megalite.text.rows import nonblank_lines, parse_json, read_lines, text_fault
from megalite.text.tokenizer import Tokenizer

NOT_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(f"\ufeffone{NOT_ENDS}two\r\n\n \t\rthree\n\ufefffour".encode())
    whole = [f"one{NOT_ENDS}two\r\n", "\n", " \t\rthree\n", "\ufefffour"]
    assert [line.raw.decode() for line in read_lines(path)] == whole
    assert [line.where for line in nonblank_lines(path)] == [f"{path}:{n}" for n in (1, 3, 4)]
    packed = tmp_path / "b.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [line.raw for line in read_lines(packed)] == [line.raw for line in read_lines(path)]
    with pytest.raises(ValueError, match="is a folder; name a file"):
        list(read_lines(tmp_path))
    with pytest.raises(ValueError, match="no such file"):
        list(read_lines(tmp_path / "none"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON (Expecting value at column 1)"),
        (b"[1,\n 2,\n x]", "not JSON (Expecting value at line 3 column 2)"),
        (b'"\xff"', "not UTF-8 (byte 1); convert"),
        (b'{"a": 1, "b": 2, "a": 1}', "key 'a' appears twice in one object"),
        (b'{"b": {"a": 1, "a": 2}}', "key 'a' appears twice in one object"),
        (b"1" * 5000, "not JSON (a number has thousands of digits)"),
        (DEEP, "not JSON (nested too deeply)"),
        (b"[" * 65 + b"1" + b"]" * 65, "not JSON (nested too deeply: more than 64 levels)"),
        (b'{"a":' * 400 + b"1" + b"}" * 400, "not JSON (nested too deeply: more than 64 levels)"),
    ],
)
def test_json_that_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        parse_json(raw)
    assert str(caught.value).startswith(message)


def test_json_that_is_read() -> None:
    deep = "[" * 64 + "1" + "]" * 64
    flat = json.dumps({"a": ["[{"] * 200})
    assert parse_json(deep.encode()) == json.loads(deep)
    assert parse_json(b"\xef\xbb\xbf" + flat.encode()) == json.loads(flat)
    assert parse_json(b'{"a": NaN, "b": -Infinity, "c": 1e999}\r\n')["c"] == float("inf")


def test_text_that_is_refused() -> None:
    assert text_fault(f"a{NOT_ENDS}\ufeff🙂") is None
    assert "NUL" in str(text_fault("a\0"))
    assert "half a surrogate pair" in str(text_fault("\udfff\ud800"))


def test_rows_of_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"prompt": "one\u2028two", "choices": ["x\x85", "y"], "label": 0}\r\n\x0c\n', "utf-8")
    (row,) = read_clozes(path)
    assert (row.prompt, row.choices) == ("one\u2028two", ("x\x85", "y"))
    path.write_text('\n\ufeff{"prompt": "a", "answer": ["b\u2029", "c"]}', "utf-8")
    assert read_questions(path)[0].answers == ("b\u2029", "c")
    for text, message in (
        ('{"prompt": "\\ud800", "answer": "b"}', "1: a text in it contains half a surrogate pair"),
        ('{"prompt": "a", "answer": "\\u0000"}', "1: a text in it contains a NUL"),
        ('{"prompt": "a", "prompt": "b", "answer": "c"}', "1: key 'prompt' appears twice"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=message):
            read_questions(path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_deep_row_is_refused_or_skipped(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(DEEP + b'\n{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:1: not JSON \(nested too deeply\)"):
        preprocess([path], tmp_path / "out", tokenizer, workers=workers)
    report = preprocess([path], tmp_path / "out", tokenizer, workers=workers, skip_bad_rows=True)
    assert (report.written[0].documents, len(report.bad_rows)) == (1, 1)
    for read in (read_questions, read_clozes):
        with pytest.raises(ValueError, match=r"in\.jsonl:1: not JSON \(nested too deeply\)"):
            read(path)


def test_a_deep_conversation(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    row = b'\n{"prompt": "p", "completion": "c"}\n'
    for deep in (DEEP, b"[" * 100_000 + b"]" * 100_000, b"[" * 100_000):
        path.write_bytes(deep + row)
        first, second = [found.value for found in read_conversations(path)]
        assert isinstance(first, RowError)
        assert second == {"prompt": "p", "completion": "c"}
    array = tmp_path / "in.json"
    array.write_bytes(b"[" + DEEP + b"]")
    with pytest.raises(ValueError, match=r"in\.json: not JSON \(nested too deeply\); it starts with"):
        list(read_conversations(array))


def test_prompts_of_a_generation(tmp_path: Path, read_prompts: Callable[[Path], list[str]]) -> None:
    path, lines = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    path.write_text('\ufeff{"prompt": "one\u2028two"}\r\n\n{"prompt": " b "}', "utf-8")
    lines.write_text("\ufeffone\u2028two\r\n\n b ", "utf-8")
    assert read_prompts(path) == read_prompts(lines) == ["one\u2028two", " b "]
    for text, message in (("[1]", ":1: expected a JSON object"), ("{", ":1: not JSON"), ("\n", "contains no prompts")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)
    lines.write_bytes(b"a\n\0\n")
    with pytest.raises(ValueError, match=r"prompts\.txt:2: the prompt contains a NUL"):
        read_prompts(lines)
