"""Rows of conversations: what is in them, what sees what, and what a run takes of them."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assets import asset

from megalite.config import Config, DataConfig, ModelConfig, TrainConfig
from megalite.data import instructions
from megalite.data.corpus import Corpus
from megalite.data.indexed import IndexedDataset
from megalite.data.instructions import Options, write_indexed
from megalite.data.packing import Conversations, Piece, SftDataset, pack, pieces
from megalite.data.sets import DataSets
from megalite.data.tuning import open_conversations as open_data
from megalite.text.chat import BUILT_IN, ChatTemplate
from megalite.text.tokenizer import Tokenizer

SEQ = 32


def brute_force(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing as the book has it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [(room[r], r) for r in range(len(rows)) if room[r] >= lengths[i]]
        if not fits:
            rows.append([])
            room.append(capacity)
            fits = [(capacity, len(rows) - 1)]
        _, r = min(fits)
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_decreasing(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.choice([1, 7, 64])
    lengths = [draw.randint(1, capacity) for _ in range(draw.randrange(60))]
    rows = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    # which of several equally full rows takes it is ours to choose: the room that is left is the book's
    left = sorted(capacity - sum(lengths[i] for i in row) for row in rows)
    assert left == sorted(capacity - sum(lengths[i] for i in row) for row in brute_force(lengths, capacity))
    assert rows == pack(np.array(lengths, dtype=np.int64), capacity)


def test_overlong() -> None:
    starts, lengths = [0, 5, 15], [5, 10, 4]
    assert pieces(starts, lengths, 4, "truncate_right") == ([Piece(0, 4), Piece(5, 4), Piece(15, 3)], 1)
    assert pieces(starts, lengths, 4, "truncate_left") == ([Piece(0, 4), Piece(10, 4), Piece(15, 3)], 1)
    assert pieces(starts, lengths, 4, "drop") == ([Piece(0, 4), Piece(15, 3)], 1)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 conversations whose words tell their number; one of weight 0.25 a message, one too long for a row."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = []
    for i in range(30):
        answer: dict[str, Any] = {"role": "assistant", "content": chr(97 + i % 26) * (1 + i % 7)}
        if i == 4:
            answer["weight"] = 0.25
        question = "?" * (40 if i == 9 else 1)
        rows.append({"messages": [{"role": "user", "content": question}, answer]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def made(chats: Path, corpus: Corpus, tokenizer: Tokenizer) -> Conversations:
    prefix = chats.with_suffix("")
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    write_indexed(chats, prefix, tokenizer, ChatTemplate("short", source, tokenizer), Options())
    return Conversations(prefix)


def everything(made: Conversations, **options: Any) -> SftDataset:
    return SftDataset(made, np.arange(len(made.lengths)), SEQ, **options)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("overlong", ["truncate_right", "truncate_left", "drop"])
def test_rows_predict_every_token_but_the_first_once(made: Conversations, packing: bool, overlong: str) -> None:
    data = everything(made, packing=packing, overlong=overlong)
    batch = data.batch(range(len(data)))
    found = []
    for b in range(len(data)):
        at = 0
        for i in data.row(b):
            length = data.pieces[i].length
            here = slice(at, at + length)
            found.append(
                (batch.tokens[b, here].tolist(), batch.labels[b, here].tolist(), batch.loss_mask[b, here].tolist())
            )
            assert batch.positions[b, here].tolist() == list(range(length))
            if packing:
                assert batch.bounds is not None
                assert batch.bounds[b, here].tolist() == [[at, at + k + 1] for k in range(length)]
            at += length
        assert not batch.loss_mask[b, at:].any()
        if packing and at < SEQ:  # padding is a document of its own: no query is without a key
            assert batch.bounds[b, at:].tolist() == [[at, k + 1] for k in range(at, SEQ)]
    assert batch.bounds is None or packing
    expected = []
    for i in range(len(made.lengths)):
        tokens, weights = made.tokens[i].tolist(), made.table[made.weights[i]].tolist()
        if len(tokens) > SEQ + 1:
            if overlong == "drop":
                continue
            keep = slice(0, SEQ + 1) if overlong == "truncate_right" else slice(-SEQ - 1, None)
            tokens, weights = tokens[keep], weights[keep]
        expected.append((tokens[:-1], tokens[1:], weights[1:]))
    assert sorted(found) == sorted(expected)
    assert data.longer == 1
    assert batch.loss_mask[batch.loss_mask == 0.25].size > 1
    layout = data.layout(range(len(data)))
    np.testing.assert_array_equal(layout.positions, batch.positions)
    assert (layout.bounds is None) == (batch.bounds is None)


def test_packing_fills_rows(made: Conversations) -> None:
    packed, padded = everything(made), everything(made, packing=False)
    assert len(padded) == 30
    assert len(packed) < 15
    assert packed.filled > 0.9 > 0.5 > padded.filled


def test_an_epoch_shows_every_row_once_and_the_layout_reads_no_token(
    made: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = everything(made, seed=3)
    epochs = [[tuple(data.row(epoch * len(data) + i)) for i in range(len(data))] for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(tuple, data.rows))
    assert epochs[0] != epochs[1] != epochs[2]
    assert everything(made, seed=3).row(len(data) + 2) == data.row(len(data) + 2)
    fresh = everything(Conversations(made.tokens.prefix), seed=3)
    monkeypatch.setattr(IndexedDataset, "_read", lambda *_: pytest.fail("a token was read"))
    fresh.layout(range(40))


def test_held_out_rows_end(made: Conversations) -> None:
    data = everything(made)
    batch = data.batch([len(data) - 1, len(data), len(data) + 5])
    assert batch.loss_mask[0].any()
    assert not batch.loss_mask[1:].any()


def config(chats: Path, corpus: Corpus, cache: Path, **data: Any) -> Config:
    values = {"sft": str(chats), "tokenizer": str(corpus.tokenizer), "template": "plain", "cache_dir": str(cache)}
    return Config(model=ModelConfig(), data=DataConfig(**{**values, **data}), train=TrainConfig(seq_len=SEQ))


def sizes(data: DataSets) -> dict[str, int]:
    return {"train": len(data.train.pieces)} | {name: len(each.pieces) for name, each in data.heldout.items()}


def test_samples_are_found_in_the_file(chats: Path, corpus: Corpus, tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = chats.read_text("utf-8").splitlines()
    copy = tmp_path / "copy.jsonl"
    # an empty line and one that is no conversation
    copy.write_text("\n".join([lines[0], "", "{}", *lines[1:]]) + "\n", "utf-8")
    settings = {"bad_rows": "skip", "valid_fraction": 0.0, "packing": False}
    data = open_data(config(copy, corpus, tmp_path, **settings)).train
    seen = set()
    for sample in range(len(data)):
        name, line = data.describe([sample]).rsplit(":", 1)
        assert name == "row copy.jsonl"
        answer = json.loads(copy.read_text("utf-8").splitlines()[int(line) - 1])["messages"][1]["content"]
        assert answer in tokenizer.decode(data.batch([sample]).tokens[0].tolist())
        seen.add(int(line))
    assert len(seen) == len(data)
    assert data.describe([0, 1]).startswith("rows copy.jsonl:")


def test_open_data(chats: Path, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "megalite")
    opened = open_data(config(chats, corpus, tmp_path))
    assert sizes(opened) == {"train": 28, "valid": 1}
    assert "30 messages rows, template plain" in caplog.text
    assert "longer than train.seq_len=32 and cut at their end" in caplog.text
    assert f"1 conversation is left out, with no trained token within train.seq_len=32 (the first: {chats}:10)" in (
        caplog.text
    )
    assert opened.template == (BUILT_IN / "plain.jinja").read_text("utf-8")
    assert sizes(open_data(config(chats, corpus, tmp_path, valid_fraction=0.3))) == {"train": 20, "valid": 9}
    assert sizes(open_data(config(chats, corpus, tmp_path, valid_fraction=0.0))) == {"train": 29}
    assert sizes(open_data(config(chats, corpus, tmp_path, valid={"x": str(chats)}))) == {"train": 29, "x": 29}
    # the second time they are found, not made
    made = sorted(tmp_path.glob("sft-*.bin"))
    written = [path.stat().st_mtime_ns for path in made]
    open_data(config(chats, corpus, tmp_path))
    assert [path.stat().st_mtime_ns for path in made] == written
    # the same from a prefix
    prefix = str(next(path for path in made if "weights" not in path.name))[: -len(".bin")]
    assert open_data(config(chats, corpus, tmp_path, sft=prefix)).fingerprint.startswith("sft-")
    for change, message in (
        ({"train_on": "last"}, "was made with train_on=assistant, data.train_on=last; make it again"),
        ({"template": "chatml"}, "was made with template plain, data.template=chatml; make it again"),
        ({"tokenizer": str(asset("mistral-v1/tokenizer.model"))}, "was made with another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            open_data(config(chats, corpus, tmp_path, **{"sft": prefix, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft": "none.jsonl"}, "data.sft=none.jsonl: no such file"),
        ({"sft": "none"}, "data.sft=none: none.idx: no such file"),
        ({"tokenizer": None}, "text needs data.tokenizer"),
        ({"template": "chatlm"}, "no chat template chatlm"),
        ({"valid_fraction": 0.99}, "of 29 conversations leaves none to train on"),
    ],
)
def test_mistakes(chats: Path, corpus: Corpus, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(config(chats, corpus, tmp_path, **change))


def test_a_refusal_is_met_once_by_all_ranks(
    chats: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text("utf-8") + "{}\n", "utf-8")
    cache = tmp_path / "cache"
    asked = config(bad, corpus, cache)
    with pytest.raises(ValueError, match=r"bad\.jsonl:31: has none of the keys"):
        open_data(asked)
    with monkeypatch.context() as patch:
        patch.setattr(instructions, "write_indexed", lambda *_: pytest.fail("the file was read again"))
        with pytest.raises(ValueError, match=r"bad\.jsonl:31: has none of the keys"):
            open_data(asked)
    # a later run finds out for itself
    monkeypatch.setattr(instructions, "SAME_RUN_S", 0.0)
    with pytest.raises(ValueError, match=r"bad\.jsonl:31: has none of the keys"):
        open_data(asked)
    assert sizes(open_data(config(bad, corpus, cache, bad_rows="skip", valid_fraction=0.0))) == {"train": 29}


def test_a_set_in_which_nothing_is_trained_is_refused(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    """For training and for each held-out set; a question longer than a row leaves no room for its answer."""
    long = tmp_path / "long.jsonl"
    messages = [{"role": "user", "content": "?" * 99}, {"role": "assistant", "content": "yes"}]
    long.write_text((json.dumps({"messages": messages}) + "\n") * 64, "utf-8")
    rest = (
        rf"no row is left in which a token is trained: 64 conversations .* \(the first: {long}:1\); raise train.seq_len"
    )
    for files, key in (
        ({"sft": str(long)}, "data.sft"),
        ({"sft": str(chats), "valid": {"hard": str(long)}}, "data.valid.hard"),
    ):
        with pytest.raises(ValueError, match=rf"^{key}={long}: {rest}"):
            open_data(config(chats, corpus, tmp_path, **files))
    assert sizes(open_data(config(long, corpus, tmp_path, overlong="truncate_left"))) == {"train": 63, "valid": 1}


def test_held_out_files_say_what_was_noticed(
    chats: Path, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "megalite")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": 1}\n{"prompt": "</s>", "completion": "c"}\n')
    options: dict[str, Any] = {"valid": {"other": str(other)}, "bad_rows": "skip"}
    for name in ("other.jsonl", "renamed.jsonl"):  # the cache is of the content, the names are of today
        path = other.rename(tmp_path / name)
        caplog.clear()
        open_data(config(chats, corpus, tmp_path / "cache", **{**options, "valid": {"other": str(path)}}))
        assert f"{name}: 2 prompt/completion rows, template plain" in caplog.text
        assert f"warning: skipped 1 bad row (data.bad_rows=skip): {path}:3: 'prompt' is a number" in caplog.text
        assert f"inside messages were made ordinary text: 1 row (the first: {path}:4)" in caplog.text
        other = path


def test_pretraining_data_is_no_instruction_data(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file|is not instruction data"):
        open_data(config(chats, corpus, tmp_path, sft=str(corpus.train)))


def test_a_prefix_of_an_older_version_is_told(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    open_data(config(chats, corpus, tmp_path))
    side = next(path for path in tmp_path.glob("sft-*.json") if "weights" not in path.name)
    values = json.loads(side.read_text("utf-8"))
    del values["report"]
    side.write_text(json.dumps(values), "utf-8")
    with pytest.raises(ValueError, match=r"older megalite or is damaged: .*\.json says nothing of report; make it"):
        open_data(config(chats, corpus, tmp_path, sft=str(side)[: -len(".json")]))


def test_a_model_with_a_smaller_vocabulary(chats: Path, corpus: Corpus, tmp_path: Path) -> None:
    small = dataclasses.replace(config(chats, corpus, tmp_path), model=ModelConfig(vocab_size=20))
    with pytest.raises(ValueError, match=r"tokens, model.vocab_size=20; name the tokenizer"):
        open_data(small)


def test_nothing_fits(made: Conversations) -> None:
    with pytest.raises(ValueError, match=r"each of its 30 conversations is longer than train.seq_len=2"):
        SftDataset(made, np.arange(30), 2, overlong="drop")
