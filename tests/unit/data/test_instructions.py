"""Conversations become indexed tokens and weights: all of a file or nothing, once per content and options."""

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.data import instructions
from megalite.data.indexed import IndexedDataset
from megalite.data.instructions import Options, examples, prepare, weights_prefix, write_indexed
from megalite.data.report import Report
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.jinja import LimitError
from megalite.text.tokenizer import Tokenizer


@pytest.fixture
def plain(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(*find_template("plain", tokenizer), tokenizer)


def row(question: str, answer: str, **more: Any) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return json.dumps({"messages": turns}) + "\n"


def write(folder: Path, *rows: str) -> Path:
    (folder / "chats.jsonl").write_text("".join(rows), "utf-8")
    return folder / "chats.jsonl"


def test_tokens_weights_and_sidecar(tokenizer: Tokenizer, plain: ChatTemplate, tmp_path: Path) -> None:
    path = write(tmp_path, row("one", "two"), row("three", "four", weight=0.25), row("five", ""), "{}\n")
    report = write_indexed(path, tmp_path / "out", tokenizer, plain, Options(bad_rows="skip"))
    tokens, weights = IndexedDataset(tmp_path / "out"), IndexedDataset(weights_prefix(tmp_path / "out"))
    side = tokens.sidecar
    assert side["weights"] == [0.0, 1.0, 0.25]
    texts = []
    for i in range(2):
        trained = [token for token, weight in zip(tokens[i].tolist(), weights[i].tolist()) if weight == 1 + i]
        texts.append(tokenizer.decode(trained))
        assert trained[-1] == tokenizer.eos_id
        assert set(weights[i].tolist()) == {0, 1 + i}
    assert [text.strip() for text in texts] == ["two", "four"]
    assert side["trained_tokens"] == sum(int((weights[i] > 0).sum()) for i in range(len(weights)))
    assert (side["documents"], side["tokens"]) == (len(tokens), tokens.num_tokens)
    assert (side["template_name"], side["template"], side["train_on"]) == ("plain", plain.source, "assistant")
    assert side["sources"] == ["chats.jsonl"]
    # the empty answer is kept, because its end is trained
    assert (len(tokens), report.bad) == (3, [f"{path}:4: {report.bad[0].partition(': ')[2]}"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("a", "b"), "{}\n"], r"chats\.jsonl:2: has none of the keys .* \(data\.bad_rows=skip skips such rows\)$"),
        (
            [row("a", "b", weight=0)],
            r"chats\.jsonl: has no trained token: the answers of 1 rows are .*chats\.jsonl:1\)$",
        ),
        ([], r"chats\.jsonl: has no valid conversation$"),
        ([row("a", "b", weight=1 + i / 512) for i in range(256)], "chats.jsonl:256: .*more than 255 different weights"),
    ],
)
def test_a_refused_file_leaves_nothing(
    tokenizer: Tokenizer, plain: ChatTemplate, tmp_path: Path, rows: list[str], message: str
) -> None:
    path = write(tmp_path, *rows)
    with pytest.raises(ValueError, match=message):
        write_indexed(path, tmp_path / "out" / "x", tokenizer, plain, Options())
    assert list((tmp_path / "out").iterdir()) == []


def test_skipped_rows_say_which_was_the_first(tokenizer: Tokenizer, plain: ChatTemplate, tmp_path: Path) -> None:
    path = write(tmp_path, "[]\n", "{}\n")
    with pytest.raises(ValueError, match=r"no valid conversation; the first bad row: .*chats\.jsonl:1: is a list"):
        write_indexed(path, tmp_path / "out", tokenizer, plain, Options(bad_rows="skip"))


def test_a_template_that_loops_is_not_skipped_as_a_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    path = write(tmp_path, row("a", "b"), row("c", "d"))
    found = examples(path, tokenizer, ChatTemplate("x", source, tokenizer), Options(bad_rows="skip"), Report())
    with pytest.raises(LimitError, match="chat template x: stopped after"):
        list(found)


def test_the_cache_goes_by_content_tokenizer_template_and_options(
    tokenizer: Tokenizer, plain: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path, row("a", "b")), tmp_path / "cache"
    first = prepare(str(path), cache, tokenizer, plain, Options())
    with monkeypatch.context() as patch:
        patch.setattr(instructions, "write_indexed", lambda *_: pytest.fail("the file was converted again"))
        again = path.rename(tmp_path / "renamed.jsonl")
        assert prepare(str(again), cache, tokenizer, plain, Options()) == first
    prefixes = {first, prepare(str(again), cache, tokenizer, plain, Options(train_on="all"))}
    other = ChatTemplate(*find_template("alpaca", tokenizer), tokenizer)
    prefixes.add(prepare(str(again), cache, tokenizer, other, Options()))
    again.write_text(row("a", "c"), "utf-8")
    prefixes.add(prepare(str(again), cache, tokenizer, plain, Options()))
    assert len(prefixes) == 4


def test_an_error_is_recorded_for_the_same_file_only(
    tokenizer: Tokenizer, plain: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path, "{}\n"), tmp_path / "cache"
    with pytest.raises(ValueError, match=r"chats\.jsonl:1: has none"):
        prepare(str(path), cache, tokenizer, plain, Options())
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"copy\.jsonl:1: has none"):
        prepare(str(copy), cache, tokenizer, plain, Options())
    monkeypatch.setattr(instructions, "write_indexed", lambda *_: pytest.fail("the file was read again"))
    with pytest.raises(ValueError, match=r"copy\.jsonl:1: has none"):
        prepare(str(copy), cache, tokenizer, plain, Options())
