"""Text files to indexed token files, streaming and in parallel; the output does not depend on the workers."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe, Process, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.data.documents import Row, read_rows, texts
from megalite.data.indexed import IndexedWriter, paths, token_dtype
from megalite.data.origin import describe_tokenizer
from megalite.text.tokenizer import Tokenizer, load_tokenizer
from megalite.watch.progress import Bar

BATCH_BYTES = 1 << 18


@dataclass
class Written:
    """What stands under one prefix; `text_bytes` is the UTF-8 size of the text without end-of-document tokens."""

    prefix: Path
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Report:
    """One entry per JSON key; `empty` counts the texts of no characters and `bad_rows` says why rows were skipped."""

    written: list[Written]
    empty: int
    bad_rows: list[str]


class Encoded(NamedTuple):
    """The documents of a batch under one key: their tokens back to back and `lengths` in tokens."""

    tokens: NDArray[Any]
    lengths: list[int]
    text_bytes: int
    empty: int


# One Encoded per key, and the reasons of the rows left out.
Answer = tuple[list[Encoded], list[str]]


class Encoder:
    """Encodes batches of rows; one lives in each worker process."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        keys: Sequence[str],
        bos_id: int | None,
        eod_id: int | None,
        skip_bad_rows: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.keys = keys
        self.begin = [] if bos_id is None else [bos_id]
        self.end = [] if eod_id is None else [eod_id]
        self.skip_bad_rows = skip_bad_rows

    def __call__(self, rows: Sequence[Row]) -> Answer:
        good: list[tuple[str, list[str]]] = []
        bad = []
        for row in rows:
            try:
                good.append((row.where, texts(row, self.keys)))
            except ValueError as error:
                if not self.skip_bad_rows:
                    raise
                bad.append(str(error))
        try:
            return [self._encode([found[i] for _, found in good]) for i in range(len(self.keys))], bad
        except ValueError:
            # one of them cannot be cut: which?
            kept = []
            for where, found in good:
                try:
                    self.tokenizer.encode_batch(found)
                    kept.append(found)
                except ValueError as error:
                    if not self.skip_bad_rows:
                        raise ValueError(f"{where}: {error}") from None
                    bad.append(f"{where}: {error}")
            return [self._encode([found[i] for found in kept]) for i in range(len(self.keys))], bad

    def _encode(self, column: list[str]) -> Encoded:
        full = [text for text in column if text]
        documents = [self.begin + ids + self.end for ids in self.tokenizer.encode_batch(full)]
        return Encoded(
            np.array([token for ids in documents for token in ids], token_dtype(self.tokenizer.vocab_size)),
            [len(ids) for ids in documents],
            sum(len(text.encode()) for text in full),
            len(column) - len(full),
        )


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.raw)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _serve(connection: Connection, tokenizer: Path, *settings: Any) -> None:
    """A worker process: answers each batch until the other end closes, or the process that started it is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    encode = Encoder(load_tokenizer(tokenizer), *settings)
    try:
        while True:
            rows = connection.recv()
            try:
                connection.send(encode(rows))
            except ValueError as error:
                connection.send(error)
    except (EOFError, OSError, KeyboardInterrupt):
        pass


def _end_with_parent() -> None:
    # the pipe does not tell: a forked worker holds a copy of the other end
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Worker:
    """A worker process and our end of the pipe to it.

    A pipe for each worker, rather than the shared queues of a process pool: when one is killed while it writes
    to a queue, the pool waits for ever.
    """

    def __init__(self, tokenizer: Path, *settings: Any) -> None:
        self.pipe, theirs = Pipe()
        self.process = Process(target=_serve, args=(theirs, tokenizer, *settings), daemon=True)
        self.process.start()
        # Only the worker may hold this end, or its death would go unseen.
        theirs.close()

    def send(self, batch: list[Row]) -> None:
        try:
            self.pipe.send(batch)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Answer:
        try:
            answer: Answer | ValueError = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def _died(self) -> ValueError:
        self.process.join()
        return ValueError(
            f"a worker process died (exit code {self.process.exitcode}), most likely for want of memory; "
            f"use fewer workers"
        )

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _parallel(batches: Iterable[list[Row]], workers: Sequence[Worker]) -> Iterator[Answer]:
    """The answers in the order of the batches, which are dealt to the workers in turn."""
    idle, busy = deque(workers), deque[Worker]()
    for batch in batches:
        answer = None
        if not idle:
            answer = busy[0].receive()
            idle.append(busy.popleft())
        idle[0].send(batch)
        busy.append(idle.popleft())
        if answer is not None:
            yield answer
    while busy:
        yield busy.popleft().receive()


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
    """Writes `{output_prefix}_{key}_document.{bin,idx,json}` for each JSON key.

    Texts of no characters are left out. Raises ValueError at the first bad row unless they are skipped, and
    then leaves nothing behind. log_interval: documents between two progress lines on stderr, 0 for none.
    """
    if append_eod and tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.path}: has no end-of-sequence token to append; leave out --append-eod")
    if prepend_bos and tokenizer.bos_id is None:
        raise ValueError(f"{tokenizer.path}: has no beginning-of-sequence token; leave out --prepend-bos")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if len(set(keys)) < len(keys):
        raise ValueError(f"the JSON keys {', '.join(keys)} repeat themselves; name each once")
    written = [Written(Path(f"{output_prefix}_{key}_document")) for key in keys]
    existing = [path for each in written for path in paths(each.prefix) if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists; pass --overwrite to replace it or choose another --output-prefix")
    bos_id, eod_id = tokenizer.bos_id if prepend_bos else None, tokenizer.eos_id if append_eod else None
    report = Report(written, 0, [])
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(each.prefix, tokenizer.vocab_size)) for each in written]
        bar = stack.enter_context(Bar("preprocessing", _size(files), shows=log_interval > 0))
        batches = _batches(_counted(read_rows(files, document_per), bar))
        settings = (keys, bos_id, eod_id, skip_bad_rows)
        if workers == 1:
            answers: Iterator[Answer] = map(Encoder(tokenizer, *settings), batches)
        else:
            started: list[Worker] = []
            for _ in range(workers):
                started.append(Worker(tokenizer.path, *settings))
                stack.callback(started[-1].close)
            answers = _parallel(batches, started)
        _write(answers, writers, report, log_interval, bar)
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


def _write(
    answers: Iterable[Answer],
    writers: Sequence[IndexedWriter],
    report: Report,
    log_interval: int,
    bar: Bar,
) -> None:
    started, logged = time.monotonic(), 0
    for columns, bad in answers:
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


def _size(files: Sequence[str | Path]) -> int | None:
    """Bytes of text in the files; None where some are compressed, or cannot be looked at."""
    try:
        return None if any(str(file).endswith(".gz") for file in files) else sum(os.path.getsize(f) for f in files)
    except OSError:
        return None


def _counted(rows: Iterable[Row], bar: Bar) -> Iterator[Row]:
    for row in rows:
        bar.done += len(row.raw)
        yield row
