"""The data of a run: one endless training order and any number of named held-out sets."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.config import Config
from megalite.data.dataset import PretrainDataset, WindowDataset, check_vocabulary, heldout_windows
from megalite.data.indexed import IndexedDataset
from megalite.data.native import open_indexed

# Reading a whole stream to look for a wrong token id is worth it up to this size; every batch is checked anyway.
SCAN_TOKENS = 200_000_000


class Section(IndexedDataset):
    """Documents [first, last) of an indexed dataset, read like one of its own."""

    def __init__(self, whole: IndexedDataset, first: int, last: int) -> None:
        starts = np.append(whole.document_starts, whole.num_tokens)
        self.whole = whole
        self.prefix, self.bin_path, self.dtype = whole.prefix, whole.bin_path, whole.dtype
        self._start = int(starts[first])
        self.num_tokens = int(starts[last]) - self._start
        self.num_documents = last - first
        self._starts: NDArray[np.int64] = starts[first:last] - self._start

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


@dataclass(frozen=True)
class DataSets:
    """`bytes_per_token` of a held-out set (None if its text is not known) turns nats per token into bits per byte."""

    train: PretrainDataset
    heldout: Mapping[str, WindowDataset]
    bytes_per_token: Mapping[str, float | None]
    fingerprint: str


def open_data(config: Config, scan: bool = True) -> DataSets:
    """Open and check the data of a resolved configuration. ValueError with a remedy for anything wrong with it.

    `scan`: read small streams through for token ids the model does not have (one rank is enough).
    """
    d, t = config.data, config.train
    if d.path is None:
        raise ValueError(
            "data.path is not set: what should the model learn from? Make data of a text, then name it:\n"
            "  python tools/preprocess_data.py --input corpus.jsonl --tokenizer-model tokenizer.model --append-eod "
            "--output-prefix data/corpus\n"
            "  torchrun --nproc_per_node 8 examples/pretrain_7b.py data.path=data/corpus_text_document"
        )
    if d.tokenizer is not None and not (Path(d.tokenizer).is_file() and d.tokenizer.endswith((".model", ".json"))):
        raise ValueError(f"data.tokenizer={d.tokenizer}: no such file; name a sentencepiece .model or a tokenizer.json")
    whole = _open(d.path, "data.path", d.reader)
    if whole.num_tokens <= t.seq_len:
        raise ValueError(
            f"data.path={d.path}: the data has {whole.num_tokens} tokens, but one sample of train.seq_len={t.seq_len} "
            f"needs {t.seq_len + 1}; use more data or a smaller train.seq_len"
        )
    train = whole
    heldout: dict[str, IndexedDataset] = {
        name: _open(prefix, f"data.valid.{name}", d.reader) for name, prefix in d.valid.items()
    }
    if not heldout and d.valid_fraction > 0:
        starts = whole.document_starts.tolist()
        cut = bisect.bisect_left(starts, whole.num_tokens * (1 - d.valid_fraction))
        if 0 < cut < whole.num_documents:
            train, heldout = Section(whole, 0, cut), {"valid": Section(whole, cut, whole.num_documents)}
        else:
            raise ValueError(
                f"{d.path}: data.valid_fraction={d.valid_fraction} of {whole.num_documents} documents holds out none; "
                f"set data.valid_fraction=0, or hold out your own set with data.valid.NAME=PREFIX"
            )
    for data in {id(x): x for x in (whole, *heldout.values())}.values() if scan else ():
        if data.num_tokens <= SCAN_TOKENS and data.sidecar.get("vocab_size", np.inf) > config.model.vocab_size:
            check_vocabulary(data, config.model.vocab_size)
    return DataSets(
        PretrainDataset(train, t.seq_len, t.seed, isolate_documents=d.isolate_documents),
        {n: heldout_windows(x, t.seq_len, isolate_documents=d.isolate_documents) for n, x in heldout.items()},
        {n: _bytes_per_token(x) for n, x in heldout.items()},
        f"{Path(d.path).name}: {train.num_tokens} tokens in {train.num_documents} documents",
    )


def _open(prefix: str, key: str, reader: str) -> IndexedDataset:
    try:
        return open_indexed(prefix, reader)
    except ValueError as error:
        raise ValueError(f"{key}={prefix}: {error}") from None


def _bytes_per_token(data: IndexedDataset) -> float | None:
    found = data.sidecar.get("text_bytes")
    # the first token of the stream is never predicted
    return found / max(1, data.num_tokens - 1) if isinstance(found, int) and found > 0 else None
