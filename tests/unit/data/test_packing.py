"""Packing: which conversations share a row, and what batches contain."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.data.corpus import Corpus
from megalite.data.indexed import IndexedDataset
from megalite.data.instructions import Options, write_indexed
from megalite.data.packing import Conversations, Piece, SftDataset, pack, pieces
from megalite.text.chat import ChatTemplate
from megalite.text.tokenizer import Tokenizer

SEQ = 32


def brute_force(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing by its definition."""
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
    # the choice among equally full rows is free, but the remaining room is not
    left = sorted(capacity - sum(lengths[i] for i in row) for row in rows)
    assert left == sorted(capacity - sum(lengths[i] for i in row) for row in brute_force(lengths, capacity))
    assert rows == pack(np.array(lengths, dtype=np.int64), capacity)


def test_overlong() -> None:
    starts, lengths = [0, 5, 15], [5, 10, 4]
    assert pieces(starts, lengths, 4, "truncate_right") == ([Piece(0, 4), Piece(5, 4), Piece(15, 3)], 1)
    assert pieces(starts, lengths, 4, "truncate_left") == ([Piece(0, 4), Piece(10, 4), Piece(15, 3)], 1)
    assert pieces(starts, lengths, 4, "drop") == ([Piece(0, 4), Piece(15, 3)], 1)


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


def test_nothing_fits(made: Conversations) -> None:
    with pytest.raises(ValueError, match=r"all 30 conversations are longer than train.seq_len=2"):
        SftDataset(made, np.arange(30), 2, overlong="drop")
