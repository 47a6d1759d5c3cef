"""Tokenizes batches of documents, in this process or in worker processes; results keep the order of the batches."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pipe, Process, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megalite.data.documents import Document, texts
from megalite.data.indexed import token_dtype
from megalite.text.tokenizer import Tokenizer, load_tokenizer


class Encoded(NamedTuple):
    """The documents of a batch under one key: concatenated `tokens`, `lengths` in tokens, and counts of their texts."""

    tokens: NDArray[Any]
    lengths: list[int]
    text_bytes: int
    empty: int


# One Encoded per key, and why rows were skipped.
Result = tuple[list[Encoded], list[str]]


class Encoder:
    """Encodes batches of documents; each worker process has its own.

    bos_id, eod_id: tokens to add before and after each document, None for none.
    """

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

    def __call__(self, documents: Sequence[Document]) -> Result:
        """Encode a batch. Raises ValueError at the first bad row unless bad rows are skipped."""
        good: list[tuple[str, list[str]]] = []
        bad = []
        for document in documents:
            try:
                good.append((document.where, texts(document, self.keys)))
            except ValueError as error:
                if not self.skip_bad_rows:
                    raise
                bad.append(str(error))
        try:
            return [self._encode([found[i] for _, found in good]) for i in range(len(self.keys))], bad
        except ValueError:
            # the tokenizer failed on the batch: find the document
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


def _serve(connection: Connection, tokenizer: Path, *settings: Any) -> None:
    """Run a worker process: encode batches until the pipe closes or the parent process ends."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    encode = Encoder(load_tokenizer(tokenizer), *settings)
    try:
        while True:
            documents = connection.recv()
            try:
                connection.send(encode(documents))
            except ValueError as error:
                connection.send(error)
    except (EOFError, OSError, KeyboardInterrupt):
        pass


def _exit_with_parent() -> None:
    # the pipe does not close when the parent dies, because forked workers hold copies of its end
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class Worker:
    """A worker process with its own Encoder, and our end of the pipe to it.

    Each worker has a pipe of its own, because a process pool waits forever if a worker is killed while it writes to the
    shared queue.
    """

    def __init__(self, tokenizer: Path, *settings: Any) -> None:
        self.pipe, theirs = Pipe()
        self.process = Process(target=_serve, args=(theirs, tokenizer, *settings), daemon=True)
        self.process.start()
        # Only the worker may hold its end, or we would not notice its death.
        theirs.close()

    def send(self, batch: list[Document]) -> None:
        """Send a batch to encode. Raises ValueError if the worker has died."""
        try:
            self.pipe.send(batch)
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Result:
        """Wait for the result of the oldest batch. Raises the encoder's ValueError, or one if the worker has died."""
        try:
            result: Result | ValueError = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(result, ValueError):
            raise result
        return result

    def _died(self) -> ValueError:
        self.process.join()
        return ValueError(
            f"a worker process died (exit code {self.process.exitcode}), most likely because memory ran out; "
            f"use fewer workers"
        )

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def encode_parallel(batches: Iterable[list[Document]], workers: Sequence[Worker]) -> Iterator[Result]:
    """Yield the results in the order of the batches, which go to the workers in turn."""
    idle, busy = deque(workers), deque[Worker]()
    for batch in batches:
        result = None
        if not idle:
            result = busy[0].receive()
            idle.append(busy.popleft())
        idle[0].send(batch)
        busy.append(idle.popleft())
        if result is not None:
            yield result
    while busy:
        yield busy.popleft().receive()
