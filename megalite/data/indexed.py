"""Writes and reads Megatron-LM's indexed token files: tokens in `prefix.bin`, their index in `prefix.idx`.

A document is one or more sequences. `prefix.json`, the sidecar, is an addition: it records the source of the tokens.
"""

import json
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megalite.data.index_file import CHUNK, DTYPES, HEADER, MAGIC, VERSION, check_sequences, damaged, read_index
from megalite.data.temporary import Locks, remove_leftovers
from megalite.text.rows import read_object

Tokens = Sequence[int] | NDArray[Any]


def paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json files of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron-LM chooses: uint16 below 65500 tokens, else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedWriter:
    """Streams documents into `prefix.{bin,idx}`.

    The final names appear only at `close()`; an exception inside the `with` block removes what was written. If
    `sidecar` is set to a mapping, it is written to `prefix.json`.

    Raises ValueError if the prefix cannot be written to.
    """

    def __init__(
        self, prefix: str | Path, vocab_size: int | None = None, dtype: str | np.dtype[Any] | None = None
    ) -> None:
        if (vocab_size is None) == (dtype is None):
            raise ValueError("IndexedWriter needs either vocab_size or dtype, not both or neither")
        self.dtype = token_dtype(vocab_size) if vocab_size is not None else np.dtype(dtype).newbyteorder("<")
        codes = [code for code, name in DTYPES.items() if np.dtype(name) == self.dtype]
        if not codes or self.dtype.kind not in "iu":
            raise ValueError(f"dtype={dtype} is not supported for token files; use uint16, int32 or int64")
        self.code = codes[0]
        self.limit = np.iinfo(self.dtype).max + 1 if vocab_size is None else vocab_size
        self.sidecar: Mapping[str, Any] | None = None
        self.num_tokens = 0
        self.lengths = array("i")
        self.documents = array("q", [0])
        self.final = paths(prefix)
        self.final[0].parent.mkdir(parents=True, exist_ok=True)
        self.temporary = [path.with_name(f"{path.name}.tmp-{os.getpid()}") for path in self.final]
        self._locks = Locks()
        try:
            remove_leftovers(self.final)
            self.bin = self._locks.open(self.temporary[0])
        except OSError as error:
            raise ValueError(
                f"{prefix} cannot be written ({error.strerror}); use a prefix in a folder with write permission"
            ) from None

    def add_document(self, *sequences: Tokens) -> None:
        """Append one document of any number of token sequences, or of none. Raises ValueError for invalid tokens."""
        for sequence in sequences:
            tokens = np.asarray(sequence, dtype=np.int64 if len(sequence) == 0 else None)
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"tokens have shape {tokens.shape} and dtype {tokens.dtype}, expected integers [n]")
            if tokens.size and (tokens.min() < 0 or tokens.max() >= self.limit):
                worst = tokens.min() if tokens.min() < 0 else tokens.max()
                raise ValueError(
                    f"document {len(self.documents) - 1}: token {worst} is outside 0..{self.limit - 1}; "
                    f"check that vocab_size or dtype matches the tokenizer"
                )
            self.bin.write(tokens.astype(self.dtype).tobytes())
            self.lengths.append(tokens.size)
            self.num_tokens += tokens.size
        self.documents.append(len(self.lengths))

    def close(self) -> None:
        """Write the index and rename the files to their final names; on failure, remove what was written."""
        try:
            self._write_index()
            self._publish()
        except BaseException:
            self.abort()
            raise

    def _write_index(self) -> None:
        lengths = np.asarray(self.lengths, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        with self.bin:
            _sync(self.bin)
        with self._locks.open(self.temporary[1]) as idx:
            idx.write(HEADER.pack(MAGIC, VERSION, self.code, len(lengths), len(self.documents)))
            idx.write(lengths.tobytes())
            idx.write((offsets * self.dtype.itemsize).tobytes())
            idx.write(np.asarray(self.documents, dtype="<i8").tobytes())
            _sync(idx)
        if self.sidecar is not None:
            with self._locks.open(self.temporary[2]) as file:
                file.write(json.dumps(self.sidecar, indent=2, ensure_ascii=False).encode() + b"\n")
                _sync(file)

    def _publish(self) -> None:
        # An old index must never be next to a new .bin file: remove it first, rename the new one last.
        for path in (self.final[1], self.final[2]):
            path.unlink(missing_ok=True)
        if self.sidecar is not None:
            self.temporary[2].rename(self.final[2])
        self.temporary[0].rename(self.final[0])
        self.temporary[1].rename(self.final[1])
        folder = os.open(self.final[0].parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        self._locks.close()

    def abort(self) -> None:
        """Remove everything written so far."""
        self.bin.close()
        for path in self.temporary:
            path.unlink(missing_ok=True)
        self._locks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class IndexedDataset:
    """Reads `prefix.{bin,idx}`: the index is mapped, tokens are read on demand.

    Attributes: `dtype`; `num_sequences`, `num_documents`, `num_tokens`; `lengths` [num_sequences] in tokens;
    `offsets` [num_sequences] in bytes; `documents` [num_documents + 1], the first sequence of each document.
    Raises ValueError if a file is missing, truncated or damaged.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path, self.sidecar_path = paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; name the prefix of a .bin/.idx pair, without the suffix, "
                    f"or make one with tools/preprocess_data.py"
                )
        index = read_index(self.idx_path)
        self.dtype = index.dtype
        self.lengths, self.offsets, self.documents = index.lengths, index.offsets, index.documents
        self.num_sequences, self.num_documents = len(self.lengths), len(self.documents) - 1
        # open now, so that reads never see another file that later gets this name
        self._file = os.open(self.bin_path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        bin_size = os.fstat(self._file).st_size
        self.num_tokens, self._contiguous = check_sequences(index, self.idx_path, self.bin_path, bin_size)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.prefix,)

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """Read bytes [start, stop) of the .bin file as tokens.

        The file is not mapped, since a mapped file that is truncated while in use kills the process with SIGBUS.
        """
        found = np.empty(stop - start, dtype=np.uint8)
        at = start
        while at < stop:
            try:
                got = os.preadv(self._file, [found.data[at - start :]], at)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.bin_path)) from None
            if got == 0:
                raise damaged(self.bin_path, f"ends at byte {at}, it was truncated while in use")
            at += got
        return found.view(self.dtype)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, sequence: int) -> NDArray[Any]:
        """Return a copy of the tokens of one sequence."""
        index = range(self.num_sequences)[sequence]
        start = int(self.offsets[index])
        return self._read(start, start + int(self.lengths[index]) * self.dtype.itemsize)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of tokens [start, stop) of the flat stream, in the file's dtype."""
        self._require_contiguous()
        item = self.dtype.itemsize
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are outside the stream of {self.num_tokens} tokens")
        return self._read(start * item, stop * item)

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Start of each document in the flat stream, [num_documents]; an empty one has the next one's."""
        self._require_contiguous()
        starts: NDArray[np.int64] = np.append(self.offsets // self.dtype.itemsize, self.num_tokens)
        return np.asarray(starts[self.documents[:-1]])

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """The content of `prefix.json`; empty if there is no such file."""
        return read_object(self.sidecar_path) if self.sidecar_path.is_file() else {}

    def chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (first position, tokens) over the whole flat stream."""
        for start in range(0, self.num_tokens, CHUNK):
            yield start, self.tokens(start, min(start + CHUNK, self.num_tokens))

    def max_token(self) -> int:
        """Return the largest token id, -1 for an empty stream; reads the whole file."""
        return max((int(tokens.max()) for _, tokens in self.chunks()), default=-1)

    def _require_contiguous(self) -> None:
        if not self._contiguous:
            raise damaged(self.idx_path, "has offsets that are not back to back in sequence order, expected them to be")
