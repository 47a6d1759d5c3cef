"""Training and evaluation windows of fixed length over one indexed token stream."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megalite.data.indexed import IndexedDataset
from megalite.data.order import SampleOrder


class Layout(NamedTuple):
    """Positions and attention bounds, which need only the index: all that inner pipeline stages use.

    `positions` [b, s] int64, counted from the first visible token. `bounds` [b, s, 2] int64: query i may attend to
    keys [first, i + 1) of its window; None if documents are not isolated.
    """

    positions: NDArray[np.int64]
    bounds: NDArray[np.int64] | None


class Batch(NamedTuple):
    """`tokens`, `labels`, `positions` [b, s] int64; `loss_mask` [b, s] float32; `bounds` as in Layout."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    positions: NDArray[np.int64]
    bounds: NDArray[np.int64] | None


class Section(IndexedDataset):
    """A view of documents [first, last) of an indexed dataset."""

    def __init__(self, whole: IndexedDataset, first: int, last: int) -> None:
        starts = np.append(whole.document_starts, whole.num_tokens)
        self.whole, self._documents = whole, (first, last)
        self.prefix, self.bin_path, self.dtype = whole.prefix, whole.bin_path, whole.dtype
        self._start = int(starts[first])
        self.num_tokens = int(starts[last]) - self._start
        self.num_documents = last - first
        self._starts: NDArray[np.int64] = starts[first:last] - self._start

    def __reduce__(self) -> tuple[Any, ...]:
        return Section, (self.whole, *self._documents)

    @property
    def document_starts(self) -> NDArray[np.int64]:  # type: ignore[override]
        return self._starts

    @property
    def sidecar(self) -> dict[str, Any]:  # type: ignore[override]
        return {}

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        return self.whole.tokens(self._start + start, self._start + stop)

    def chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        for start in range(0, self.num_tokens, 1 << 20):
            yield start, self.tokens(start, min(start + (1 << 20), self.num_tokens))


class Samples(Protocol):
    """The interface for training and evaluation. Indices past `len` are the next epoch, or fully masked."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples `indices`, stacked [b, s]."""

    def layout(self, indices: Sequence[int]) -> Layout:
        """Return positions and bounds of the samples `indices` without reading tokens."""

    def describe(self, indices: Sequence[int]) -> str:
        """Return where in the data the samples `indices` are, for messages."""


class WindowDataset:
    """All windows of a stream in file order; the last one may be partial, and is then padded and masked.

    Together they predict each token but the first exactly once. Windows past the end are fully masked, so that an
    evaluation can fill its last batch.

    isolate_documents: restart attention and positions at each document (bounds are returned).
    eod_mask_loss: do not predict the first token of a document (Megatron-LM's name).

    Raises ValueError if the stream has fewer than 2 tokens.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_len: int,
        *,
        isolate_documents: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        if indexed.num_tokens < 2:
            raise ValueError(
                f"{indexed.prefix}: has {indexed.num_tokens} tokens, but one prediction needs 2; use more data"
            )
        self.indexed = indexed
        self.seq_len = seq_len
        self.isolate_documents = isolate_documents
        self.eod_mask_loss = eod_mask_loss

    def __len__(self) -> int:
        return -(-(self.indexed.num_tokens - 1) // self.seq_len)

    def window(self, index: int) -> int:
        """Return the number of the window of sample `index`."""
        return index

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples `indices`, stacked [b, s]."""
        windows = [self.window(index) for index in indices]
        shape = (len(windows), self.seq_len + 1)
        stream = np.zeros(shape, dtype=np.int64)
        loss_mask = np.zeros((shape[0], self.seq_len), dtype=np.float32)
        for row, window in enumerate(windows):
            start = window * self.seq_len
            stop = min(start + self.seq_len + 1, self.indexed.num_tokens)
            if stop - start > 1:
                stream[row, : stop - start] = self.indexed.tokens(start, stop)
                loss_mask[row, : stop - start - 1] = 1
                if self.eod_mask_loss:
                    starts = self._document_starts(start + 1, stop)
                    loss_mask[row, starts - start - 1] = 0
        return Batch(stream[:, :-1].copy(), stream[:, 1:].copy(), loss_mask, *self._layout(windows))

    def layout(self, indices: Sequence[int]) -> Layout:
        """Return positions and bounds of the samples `indices` without reading tokens."""
        return self._layout([self.window(index) for index in indices])

    def describe(self, indices: Sequence[int]) -> str:
        """Return the numbers of the documents in the samples `indices`, counted from 0."""
        found: set[int] = set()
        for window in map(self.window, indices):
            ends = (window * self.seq_len, min((window + 1) * self.seq_len, self.indexed.num_tokens - 1))
            first, last = np.searchsorted(self.indexed.document_starts, ends, side="right") - 1
            found |= set(range(int(first), int(last) + 1))
        return list_places("document", sorted(found))

    def _layout(self, windows: Sequence[int]) -> Layout:
        query = np.arange(self.seq_len)
        if not self.isolate_documents:
            return Layout(np.tile(query, (len(windows), 1)), None)
        first = np.zeros((len(windows), self.seq_len), dtype=np.int64)
        for row, window in enumerate(windows):
            start = window * self.seq_len
            starts = self._document_starts(start + 1, start + self.seq_len) - start
            first[row, starts] = starts
        first = np.maximum.accumulate(first, axis=1)
        return Layout(query - first, np.stack([first, np.broadcast_to(query + 1, first.shape)], axis=-1))

    def _document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document starts in [start, stop) of the stream."""
        starts = self.indexed.document_starts
        low, high = np.searchsorted(starts, [start, min(stop, self.indexed.num_tokens)])
        return starts[low:high]


class PretrainDataset(WindowDataset):
    """Whole windows in shuffled order, endless. Sample numbers are consumed samples; `len` is one epoch."""

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_len: int,
        seed: int,
        *,
        shuffle: bool = True,
        isolate_documents: bool = False,
        eod_mask_loss: bool = False,
    ) -> None:
        self.order = SampleOrder(indexed.num_tokens, seq_len, seed, shuffle)
        super().__init__(indexed, seq_len, isolate_documents=isolate_documents, eod_mask_loss=eod_mask_loss)

    def __len__(self) -> int:
        return self.order.num_samples

    def window(self, index: int) -> int:
        return self.order[index][1]


def heldout_windows(indexed: IndexedDataset, seq_len: int, *, isolate_documents: bool = False) -> WindowDataset:
    """Return all windows of a held-out stream in order; every token but the first is predicted once."""
    return WindowDataset(indexed, seq_len, isolate_documents=isolate_documents)


def list_places(noun: str, places: Sequence[object]) -> str:
    """Return `document 3`, or `documents 3, 7, 8`, with at most eight places."""
    first = [str(each) for each in places[:8]]
    return f"{noun}{'s' * (len(places) != 1)} {', '.join(first)}" + ", ..." * (len(places) > len(first))


class Spread:
    """`count` samples spread evenly over a set, so that a sorted set is not judged by its beginning.

    The choice depends only on the two lengths.
    """

    def __init__(self, samples: Samples, count: int) -> None:
        self.samples, self.count = samples, count

    def __len__(self) -> int:
        return self.count

    def _places(self, indices: Sequence[int]) -> list[int]:
        # the middle of each of `count` equal parts; indices past the end map past the end
        return [(2 * index + 1) * len(self.samples) // (2 * self.count) for index in indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.samples.batch(self._places(indices))

    def layout(self, indices: Sequence[int]) -> Layout:
        return self.samples.layout(self._places(indices))

    def describe(self, indices: Sequence[int]) -> str:
        return self.samples.describe(self._places(indices))


def check_vocabulary(indexed: IndexedDataset, vocab_size: int) -> None:
    """Read the whole stream. Raises ValueError at the first token that is not in 0..vocab_size - 1."""
    for start, tokens in indexed.chunks():
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if wrong.size:
            position = start + int(wrong[0])
            document = int(np.searchsorted(indexed.document_starts, position, side="right")) - 1
            raise ValueError(
                f"{indexed.bin_path}: token {tokens[wrong[0]]} at position {position} (document {document}) is outside "
                f"0..{vocab_size - 1}, the range of model.vocab_size={vocab_size}; the largest token is "
                f"{indexed.max_token()}: increase vocab_size or preprocess the text with the model's own tokenizer"
            )
