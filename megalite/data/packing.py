"""Packs conversations into rows of tokens. The rows depend only on the lengths of the conversations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.data.dataset import Batch, Layout, list_places
from megalite.data.indexed import IndexedDataset
from megalite.data.instructions import weights_prefix
from megalite.data.order import EpochOrder
from megalite.data.report import from_sidecar, locate


class Piece(NamedTuple):
    """`length` positions in a row, which predict tokens [start + 1, start + length] of the stream."""

    start: int
    length: int


def pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Return rows of indices into `lengths` [n]; each index is in one row, and no row's sum exceeds `capacity`.

    Best fit decreasing (Johnson 1973): longest first, each into the fullest row that has room for it; equal lengths in
    order. Every length must be in 1..capacity.
    """
    rows: list[list[int]] = []
    # rows by their remaining room; bit r of `rooms` is set if there is a row with room r
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        candidates = rooms >> length
        if candidates:
            room = length + (candidates & -candidates).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def kept_part(tokens: int, seq_len: int, overlong: str) -> slice:
    """Return which of a conversation's `tokens` are kept: at most seq_len + 1, since n tokens predict n - 1.

    overlong: of a longer conversation, `truncate_right` keeps the start, `truncate_left` the end, `drop` nothing.
    """
    over = max(0, tokens - 1 - seq_len)
    if over and overlong == "drop":
        return slice(0, 0)
    return slice(over, tokens) if overlong == "truncate_left" else slice(0, tokens - over)


def pieces(starts: Sequence[int], lengths: Sequence[int], seq_len: int, overlong: str) -> tuple[list[Piece], int]:
    """Return the pieces of conversations with the given stream starts and lengths, and how many exceed a row."""
    parts = [(start, kept_part(tokens, seq_len, overlong)) for start, tokens in zip(starts, lengths)]
    found = [Piece(start + part.start, part.stop - part.start - 1) for start, part in parts if part.stop]
    return found, sum(tokens - 1 > seq_len for tokens in lengths)


class Conversations:
    """The indexed files of tokens and weights of a prefix. Raises ValueError if they are not instruction data."""

    def __init__(self, prefix: str | Path) -> None:
        self.tokens, self.weights = IndexedDataset(prefix), IndexedDataset(weights_prefix(prefix))
        self.sidecar = self.tokens.sidecar
        if "weights" not in self.sidecar or not np.array_equal(self.tokens.lengths, self.weights.lengths):
            raise ValueError(
                f"{prefix}: is not instruction data with weights; make it with tools/data.py sft, or use data.path"
            )
        weights = self.sidecar["weights"]
        if not (
            isinstance(weights, list) and weights and all(type(w) in (int, float) and 0 <= w < 1e6 for w in weights)
        ):
            raise ValueError(f"{prefix}.json: 'weights' is not a list of numbers of 0 or more; make the data again")
        self.table = np.array(weights, dtype=np.float32)
        self.starts: NDArray[np.int64] = np.asarray(self.tokens.offsets, dtype=np.int64) // self.tokens.dtype.itemsize
        self.lengths: NDArray[np.int64] = np.asarray(self.tokens.lengths, dtype=np.int64)

    def weigh(self, places: NDArray[Any]) -> NDArray[np.float32]:
        """Return the weights at indices `places` of the sidecar's list. Raises ValueError if an index is too large."""
        if places.size and int(places.max()) >= len(self.table):
            raise ValueError(
                f"{self.weights.bin_path}: contains index {places.max()}, but the sidecar has {len(self.table)} "
                f"weights; make the data again"
            )
        return self.table[places]


class SftDataset:
    """Rows of conversations: several per row, or one if packing=False. No conversation attends to or predicts another.

    chosen: the numbers of the conversations. seed: shuffle the rows in each epoch, endlessly; `len` is one epoch. If
    None, rows come in order and those past the end are fully masked. Padding is a separate document with mask 0.

    Raises ValueError if no conversation fits into a row.
    """

    def __init__(
        self,
        data: Conversations,
        chosen: NDArray[np.int64],
        seq_len: int,
        *,
        seed: int | None = None,
        packing: bool = True,
        overlong: str = "truncate_right",
    ) -> None:
        self.data, self.seq_len, self.packing = data, seq_len, packing
        starts, lengths = data.starts[chosen].tolist(), data.lengths[chosen].tolist()
        self.pieces, self.longer = pieces(starts, lengths, seq_len, overlong)
        if not self.pieces:
            raise ValueError(
                f"{data.tokens.prefix}: all {len(chosen)} conversations are longer than train.seq_len={seq_len}; "
                f"increase it, or set data.overlong=truncate_right"
            )
        each = np.array([piece.length for piece in self.pieces], dtype=np.int64)
        self.rows = pack(each, seq_len) if packing else [[i] for i in range(len(each))]
        self.filled = float(each.sum() / (len(self.rows) * seq_len))
        self.order = EpochOrder(len(self.rows), seed) if seed is not None else None

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> list[int]:
        """Return the numbers of the pieces in the row of sample `index`."""
        if self.order is not None:
            return self.rows[self.order[index][1]]
        return self.rows[index] if index < len(self.rows) else []

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples `indices`, stacked [b, s]; loss_mask [b, s] is the weight of each label."""
        shape = (len(indices), self.seq_len)
        tokens, labels = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        loss_mask = np.zeros(shape, dtype=np.float32)
        for b, index in enumerate(indices):
            at = 0
            for start, length in (self.pieces[i] for i in self.row(index)):
                stream = self.data.tokens.tokens(start, start + length + 1)
                here = slice(at, at + length)
                tokens[b, here], labels[b, here] = stream[:-1], stream[1:]
                loss_mask[b, here] = self.data.weigh(self.data.weights.tokens(start + 1, start + length + 1))
                at += length
        return Batch(tokens, labels, loss_mask, *self.layout(indices))

    def layout(self, indices: Sequence[int]) -> Layout:
        """Return positions and bounds of the samples `indices` without reading tokens."""
        query = np.arange(self.seq_len)
        if not self.packing:  # no bounds needed: causal attention hides the padding, which comes last
            return Layout(np.tile(query, (len(indices), 1)), None)
        first = np.zeros((len(indices), self.seq_len), dtype=np.int64)
        for b, index in enumerate(indices):
            ends = np.cumsum([self.pieces[i].length for i in self.row(index)], dtype=np.int64)
            starts = ends[ends < self.seq_len]
            first[b, starts] = starts
        first = np.maximum.accumulate(first, axis=1)
        return Layout(query - first, np.stack([first, np.broadcast_to(query + 1, first.shape)], axis=-1))

    def describe(self, indices: Sequence[int]) -> str:
        """Return the places in the file, or else the numbers from 0, of the conversations in the rows `indices`."""
        starts = [self.pieces[i].start for index in indices for i in self.row(index)]
        numbers = sorted(set((np.searchsorted(self.data.starts, starts, side="right") - 1).tolist()))
        sidecar = self.data.sidecar
        if "report" not in sidecar:
            return list_places("conversation", numbers)
        path = sidecar["sources"][0]
        report = from_sidecar(sidecar["report"], path)
        return list_places("row", [locate(report, number, path) for number in numbers])
