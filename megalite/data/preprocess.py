"""Tokenizes text files into indexed token files, streaming and in parallel.

The output does not depend on the number of workers.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.data.documents import Document, read_documents
from megalite.data.indexed import IndexedWriter, paths
from megalite.data.origin import describe_tokenizer
from megalite.data.workers import Encoder, Result, Worker, encode_parallel
from megalite.text.tokenizer import Tokenizer
from megalite.watch.progress import Bar

BATCH_BYTES = 1 << 18


@dataclass
class Written:
    """What was written to one prefix; `text_bytes` is the UTF-8 size of the text, without end-of-document tokens."""

    prefix: Path
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Report:
    """`written`: one entry per JSON key. `empty`: the number of empty texts. `bad_rows`: why rows were skipped."""

    written: list[Written]
    empty: int
    bad_rows: list[str]


def preprocess(
    files: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    keys: Sequence[str] = ("text",),
    document_per: str = "paragraph",
    append_eod: bool = False,
    prepend_bos: bool = False,
    workers: int = 1,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
    log_interval: int = 0,
) -> Report:
    """Write `{output_prefix}_{key}_document.{bin,idx,json}` for each JSON key; empty texts are left out.

    document_per: what a document is in plain text, `file`, `line` or `paragraph`. log_interval: documents between
    progress lines on stderr, 0 for none.

    Raises ValueError for wrong settings, for an input without text, and, unless skip_bad_rows, at the first bad row;
    no files are left behind then.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if len(set(keys)) < len(keys):
        raise ValueError(f"the JSON keys {', '.join(keys)} contain duplicates; name each key once")
    bos_id, eod_id = _added_tokens(tokenizer, prepend_bos, append_eod)
    written = [Written(Path(f"{output_prefix}_{key}_document")) for key in keys]
    existing = [path for each in written for path in paths(each.prefix) if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists; pass --overwrite to replace it or choose another --output-prefix")
    report = Report(written, 0, [])
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(each.prefix, tokenizer.vocab_size)) for each in written]
        bar = stack.enter_context(Bar("preprocessing", _total_size(files), shows=log_interval > 0))
        batches = _batches(_with_progress(read_documents(files, document_per), bar))
        settings = (keys, bos_id, eod_id, skip_bad_rows)
        if workers == 1:
            results: Iterator[Result] = map(Encoder(tokenizer, *settings), batches)
        else:
            started: list[Worker] = []
            for _ in range(workers):
                started.append(Worker(tokenizer.path, *settings))
                stack.callback(started[-1].close)
            results = encode_parallel(batches, started)
        _write(results, writers, report, log_interval, bar)
        if not any(each.documents for each in written):
            raise ValueError(f"{', '.join(map(str, files))}: no document with any text; check the input")
        for writer, each in zip(writers, written):
            writer.sidecar = {
                "documents": each.documents,
                "tokens": each.tokens,
                "text_bytes": each.text_bytes,
                **({"prepend_bos": True} if prepend_bos else {}),
                "append_eod": append_eod,
                "eod_id": eod_id,
                **describe_tokenizer(tokenizer, each.prefix.parent),
                "sources": [Path(file).name for file in files],
            }
    return report


def _added_tokens(tokenizer: Tokenizer, prepend_bos: bool, append_eod: bool) -> tuple[int | None, int | None]:
    """The ids to add before and after each document, None for none."""
    if append_eod and tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.path}: has no end-of-sequence token to append; omit --append-eod")
    if prepend_bos and tokenizer.bos_id is None:
        raise ValueError(f"{tokenizer.path}: has no beginning-of-sequence token; omit --prepend-bos")
    return tokenizer.bos_id if prepend_bos else None, tokenizer.eos_id if append_eod else None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.raw)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    results: Iterable[Result],
    writers: Sequence[IndexedWriter],
    report: Report,
    log_interval: int,
    bar: Bar,
) -> None:
    started, logged = time.monotonic(), 0
    for columns, bad in results:
        report.bad_rows += bad
        for writer, column, each in zip(writers, columns, report.written):
            for document in np.split(column.tokens, np.cumsum(column.lengths)[:-1]) if column.lengths else ():
                writer.add_document(document)
            each.documents += len(column.lengths)
            each.tokens += len(column.tokens)
            each.text_bytes += column.text_bytes
            report.empty += column.empty
        first = report.written[0]
        speed = first.text_bytes / (time.monotonic() - started) / 1e6
        fields = (f"{first.documents} documents", f"{first.tokens} tokens", f"{speed:.1f} MB/s")
        if bar.live:
            bar.advance(0, *fields)
        elif log_interval and first.documents // log_interval > logged:
            logged = first.documents // log_interval
            bar.show(*fields)


def _total_size(files: Sequence[str | Path]) -> int | None:
    """The bytes of text in the files; None if a file is compressed or cannot be accessed."""
    try:
        return None if any(str(file).endswith(".gz") for file in files) else sum(os.path.getsize(f) for f in files)
    except OSError:
        return None


def _with_progress(documents: Iterable[Document], bar: Bar) -> Iterator[Document]:
    for document in documents:
        bar.done += len(document.raw)
        yield document
