"""The index file of token files: `prefix.idx` in Megatron-LM's format, parsed and checked.

Header: magic, version 1, dtype code, numbers of sequences and of document boundaries. Then int32 lengths in tokens,
int64 offsets in bytes, and int64 document boundaries, which count sequences.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
# elements that are checked or read at a time
CHUNK = 1 << 22


class Index(NamedTuple):
    """Views of a mapped index.

    `lengths` [sequences] in tokens, `offsets` [sequences] in bytes, `documents` [documents + 1], the first sequence of
    each document.
    """

    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    documents: NDArray[np.int64]


def damaged(path: Path, found: str) -> ValueError:
    """The error for a file that contradicts the format; `found` says how."""
    return ValueError(
        f"{path}: {found}; the file is damaged or of another kind, write the .bin/.idx pair again with "
        f"tools/preprocess_data.py"
    )


def read_index(path: Path) -> Index:
    """Map an index file and check its header, size and document boundaries. Raises ValueError if they are wrong."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise damaged(path, f"is {size} bytes, shorter than the {HEADER.size}-byte header")
    index = np.memmap(path, dtype=np.uint8, mode="r")
    magic, version, code, sequences, boundaries = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise damaged(path, f"starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise damaged(path, f"has version {version}, expected {VERSION}")
    if code in DTYPES and np.dtype(DTYPES[code]).kind == "f":
        raise ValueError(
            f"{path}: contains {np.dtype(DTYPES[code]).name} numbers (dtype code {code}), but token ids are "
            f"integers; name a prefix of tokens written by tools/preprocess_data.py"
        )
    if code not in DTYPES:
        raise damaged(path, f"has dtype code {code}, expected an integer type: 1, 2, 3, 4, 5 or 8")
    documents_at = HEADER.size + 12 * sequences
    end = documents_at + 8 * boundaries
    # nothing but the file size shows that there are modes
    if sequences and size == end + sequences:
        raise ValueError(
            f"{path}: is a multimodal index, with a mode for each of its {sequences} sequences, which megalite cannot "
            f"train on; write the text alone with tools/preprocess_data.py"
        )
    if size != end:
        raise damaged(
            path, f"is {size} bytes, expected {end} for {sequences} sequences and {boundaries} document boundaries"
        )
    lengths = index[HEADER.size : HEADER.size + 4 * sequences].view("<i4")
    offsets = index[HEADER.size + 4 * sequences : documents_at].view("<i8")
    documents = index[documents_at:end].view("<i8")
    _check_documents(path, documents, sequences)
    return Index(np.dtype(DTYPES[code]), lengths, offsets, documents)


def _check_documents(path: Path, documents: NDArray[np.int64], sequences: int) -> None:
    if len(documents) == 0:
        raise damaged(path, "has 0 document boundaries, expected at least 1")
    first, last = int(documents[0]), int(documents[-1])
    if first != 0 or last != sequences:
        raise damaged(path, f"has a document index from {first} to {last}, expected 0 to {sequences}")
    for start in range(0, len(documents) - 1, CHUNK):
        backwards = np.flatnonzero(np.diff(documents[start : start + CHUNK + 1]) < 0)
        if backwards.size:
            document = start + int(backwards[0])
            before, after = documents[document : document + 2]
            raise damaged(
                path,
                f"has a document index falling from {before} to {after} at document {document}, "
                f"expected it never to fall",
            )


def check_sequences(index: Index, path: Path, bin_path: Path, bin_size: int) -> tuple[int, bool]:
    """Check lengths and offsets of the index at `path` against the size of the .bin file in bytes.

    Returns the number of tokens, and whether the sequences are back to back in order. Raises ValueError if a length or
    offset is negative or the .bin file has another size.
    """
    item, total, end = index.dtype.itemsize, 0, 0
    contiguous = True
    for start in range(0, len(index.lengths), CHUNK):
        lengths = index.lengths[start : start + CHUNK].astype(np.int64)
        offsets = index.offsets[start : start + CHUNK]
        for name, values in (("length", lengths), ("offset", offsets)):
            if values.min() < 0:
                worst = int(values.argmin())
                raise damaged(path, f"has {name} {values[worst]} at sequence {start + worst}, expected 0 or more")
        ends = offsets.astype(np.uint64) + (lengths * item).astype(np.uint64)  # int64 could wrap
        expected = np.concatenate([[total * item], total * item + np.cumsum(lengths[:-1]) * item])
        contiguous &= bool((offsets == expected).all())
        total += int(lengths.sum())
        end = max(end, int(ends.max()))
    if bin_size != end:
        raise damaged(
            bin_path, f"is {bin_size} bytes, expected {end} by its index of {total} {index.dtype.name} tokens"
        )
    return total, contiguous
