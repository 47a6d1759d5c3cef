"""Megatron's indexed token files: `prefix.bin` holds the tokens, `prefix.idx` says where each sequence lies.

A document is one or more sequences. `prefix.json`, written beside them, is ours: what the tokens were made of.
"""

import json
import os
import struct
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megalite.data.temporary import Locks, remove_leftovers
from megalite.text.rows import read_object

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CHUNK = 1 << 22

Tokens = Sequence[int] | NDArray[Any]


def paths(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json files of a prefix."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice: u16 below 65500 tokens, else i32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedWriter:
    """Streams documents into `prefix.{bin,idx}`.

    Nothing appears under the final names before `close()`; leaving the `with` block by an exception removes
    what was written. Setting `sidecar` to a mapping writes it as `prefix.json` along with the rest.
    """

    def __init__(
        self, prefix: str | Path, vocab_size: int | None = None, dtype: str | np.dtype[Any] | None = None
    ) -> None:
        if (vocab_size is None) == (dtype is None):
            raise ValueError("IndexedWriter takes either vocab_size or dtype; give exactly one of them")
        self.dtype = token_dtype(vocab_size) if vocab_size is not None else np.dtype(dtype).newbyteorder("<")
        codes = [code for code, name in DTYPES.items() if np.dtype(name) == self.dtype]
        if not codes or self.dtype.kind not in "iu":
            raise ValueError(f"dtype={dtype} cannot hold tokens in this format; use uint16, int32 or int64")
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
                f"{prefix} cannot be written ({error.strerror}); name a prefix in a folder that you may write to"
            ) from None

    def add_document(self, *sequences: Tokens) -> None:
        """Append one document made of any number of token sequences; none at all is an empty document."""
        for sequence in sequences:
            tokens = np.asarray(sequence, dtype=np.int64 if len(sequence) == 0 else None)
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise ValueError(f"tokens have shape {tokens.shape} and dtype {tokens.dtype}; give one row of integers")
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
        """Write the index and give the files their final names; on failure remove what was written."""
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
        # An old index must never stand beside a new .bin: it goes first, the new one comes last.
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
    """Reads `prefix.{bin,idx}`: the index is mapped, tokens are read when they are asked for.

    Attributes: `dtype`; `num_sequences`, `num_documents`, `num_tokens`; `lengths` [num_sequences] in tokens;
    `offsets` [num_sequences] in bytes; `documents` [num_documents + 1], the first sequence of each document.
    Raises ValueError when the files are missing, cut short or contradict themselves.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path, self.sidecar_path = paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise ValueError(
                    f"{path}: no such file; give the prefix of a .bin/.idx pair, without the suffix, "
                    f"or make one with tools/preprocess_data.py"
                )
        size = self.idx_path.stat().st_size
        if size < HEADER.size:
            raise self._error(f"is {size} bytes, shorter than the {HEADER.size}-byte header")
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        magic, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise self._error(f"starts with {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise self._error(f"has version {version}, expected {VERSION}")
        if code in DTYPES and np.dtype(DTYPES[code]).kind == "f":
            raise ValueError(
                f"{self.idx_path}: holds {np.dtype(DTYPES[code]).name} numbers (dtype code {code}), and token ids are "
                f"integers; name a prefix of tokens, as tools/preprocess_data.py writes it"
            )
        if code not in DTYPES:
            raise self._error(f"has dtype code {code}, expected an integer type: 1, 2, 3, 4, 5 or 8")
        documents_at = HEADER.size + 12 * sequences
        end = documents_at + 8 * boundaries
        # announced by the size of the file alone
        if sequences and size == end + sequences:
            raise ValueError(
                f"{self.idx_path}: is a multimodal index, with a mode for each of its {sequences} sequences, which "
                f"megalite does not train; write the text alone with tools/preprocess_data.py"
            )
        if size != end:
            raise self._error(
                f"is {size} bytes, expected {end} for {sequences} sequences and {boundaries} document boundaries"
            )
        self.dtype = np.dtype(DTYPES[code])
        self.num_sequences: int = sequences
        self.num_documents: int = boundaries - 1
        self.lengths = index[HEADER.size : HEADER.size + 4 * sequences].view("<i4")
        self.offsets = index[HEADER.size + 4 * sequences : documents_at].view("<i8")
        self.documents = index[documents_at:end].view("<i8")
        # opened now, so that another file of the same name does not take its place later
        self._file = os.open(self.bin_path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._check_documents()
        self.num_tokens, self._contiguous = self._check_sequences()

    def _error(self, found: str, path: Path | None = None) -> ValueError:
        return ValueError(
            f"{path or self.idx_path}: {found}; the file is damaged or of another kind, "
            f"write the .bin/.idx pair again with tools/preprocess_data.py"
        )

    def _check_documents(self) -> None:
        if self.num_documents < 0:
            raise self._error("has 0 document boundaries, expected at least 1")
        first, last = int(self.documents[0]), int(self.documents[-1])
        if first != 0 or last != self.num_sequences:
            raise self._error(f"has a document index from {first} to {last}, expected 0 to {self.num_sequences}")
        for start in range(0, self.num_documents, CHUNK):
            backwards = np.flatnonzero(np.diff(self.documents[start : start + CHUNK + 1]) < 0)
            if backwards.size:
                document = start + int(backwards[0])
                before, after = self.documents[document : document + 2]
                raise self._error(
                    f"has a document index falling from {before} to {after} at document {document}, "
                    f"expected it never to fall"
                )

    def _check_sequences(self) -> tuple[int, bool]:
        """Checks lengths and offsets against the .bin file.

        Returns the number of tokens and whether the sequences lie back to back in order.
        """
        item, total, end = self.dtype.itemsize, 0, 0
        contiguous = True
        for start in range(0, self.num_sequences, CHUNK):
            lengths = self.lengths[start : start + CHUNK].astype(np.int64)
            offsets = self.offsets[start : start + CHUNK]
            for name, values in (("length", lengths), ("offset", offsets)):
                if values.min() < 0:
                    worst = int(values.argmin())
                    raise self._error(f"has {name} {values[worst]} at sequence {start + worst}, expected 0 or more")
            ends = offsets.astype(np.uint64) + (lengths * item).astype(np.uint64)  # int64 could wrap
            expected = np.concatenate([[total * item], total * item + np.cumsum(lengths[:-1]) * item])
            contiguous &= bool((offsets == expected).all())
            total += int(lengths.sum())
            end = max(end, int(ends.max()))
        size = os.fstat(self._file).st_size
        if size != end:
            raise self._error(
                f"is {size} bytes, expected {end} by its index of {total} {self.dtype.name} tokens", self.bin_path
            )
        return total, contiguous

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.prefix,)

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """Bytes [start, stop) of the .bin file as tokens.

        Read, not mapped: where the file is cut short while it is in use, a mapping ends the process (SIGBUS).
        """
        found = np.empty(stop - start, dtype=np.uint8)
        at = start
        while at < stop:
            try:
                got = os.preadv(self._file, [found.data[at - start :]], at)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.bin_path)) from None
            if got == 0:
                raise self._error(f"ends at byte {at}, it was cut short while in use", self.bin_path)
            at += got
        return found.view(self.dtype)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, sequence: int) -> NDArray[Any]:
        """A copy of the tokens of one sequence."""
        index = range(self.num_sequences)[sequence]
        start = int(self.offsets[index])
        return self._read(start, start + int(self.lengths[index]) * self.dtype.itemsize)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """A copy of tokens [start, stop) of the flat stream, in the file's dtype."""
        self._require_contiguous()
        item = self.dtype.itemsize
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.num_tokens}")
        return self._read(start * item, stop * item)

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Flat token offset of each document, [num_documents]; an empty document repeats the next one's."""
        self._require_contiguous()
        starts: NDArray[np.int64] = np.append(self.offsets // self.dtype.itemsize, self.num_tokens)
        return np.asarray(starts[self.documents[:-1]])

    @cached_property
    def sidecar(self) -> dict[str, Any]:
        """What `prefix.json` says of these tokens; empty if there is none."""
        return read_object(self.sidecar_path) if self.sidecar_path.is_file() else {}

    def chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first position, tokens) over the whole flat stream."""
        for start in range(0, self.num_tokens, CHUNK):
            yield start, self.tokens(start, min(start + CHUNK, self.num_tokens))

    def max_token(self) -> int:
        """The largest token id, -1 for an empty stream; reads the whole file."""
        return max((int(tokens.max()) for _, tokens in self.chunks()), default=-1)

    def _require_contiguous(self) -> None:
        if not self._contiguous:
            raise self._error("has offsets that are not back to back in sequence order, expected them to be")
