"""Headers of safetensors files, written and checked (huggingface.co/docs/safetensors, "Format"). No torch here.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and byte range per tensor),
and the tensors' bytes without gaps. The safetensors library needs all tensors of a file in memory to write it; from
`make_header` a file can be written one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from megalite.config.dtypes import BY_CODE, DType
from megalite.config.values import shown

# the library refuses longer headers too
HEADER_BYTES = 100_000_000
# the library writes this into every file of torch's tensors
METADATA = {"format": "pt"}


class UnknownDtype(ValueError):
    """A tensor of a dtype that megalite does not read, as those of quantised weights."""


class Entry(NamedTuple):
    """One tensor of a file: `dtype` is the header's code (F32, BF16, ...), bytes `start` to `stop` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def make_header(tensors: Mapping[str, tuple[DType, Sequence[int]]]) -> tuple[bytes, int]:
    """The first bytes of a file that holds `tensors` (dtype and shape by key) in this order, and the size of the rest.

    The header is padded with spaces so that the data starts at a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for key, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.bytes * math.prod(shape)
        entries[key] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def read_header(
    file: BinaryIO,
    unread: Callable[[str], object] = lambda key: False,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Entry]:
    """The tensors of an open file by key, in the order of their bytes.

    `unread`: keys that are left out; they may be of any dtype. `metadata`: what the file's __metadata__ must be; None:
    anything. Raises ValueError, in one line that does not name the file, if the header is longer than the file or not
    JSON, if a tensor has no usable dtype, shape or byte range, if tensors overlap or leave a gap, and if the file ends
    before or after its last tensor. Raises UnknownDtype for a dtype that is not in config/dtypes.py.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, HEADER_BYTES):
        raise ValueError(f"not a safetensors file, or cut short: {size} bytes")
    try:
        header = json.loads(file.read(length))
    except RecursionError:
        raise ValueError("damaged: its header is JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"damaged: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("damaged: its header is not a JSON object")
    found = header.pop("__metadata__", None)
    if metadata is not None and found != metadata:
        raise ValueError("damaged: its header's __metadata__ is not what was written")
    for key, entry in header.items():
        if not _is_entry(entry):
            raise ValueError(
                f"damaged: tensor {shown(key)} is described as {shown(entry)}, without a usable dtype, shape and "
                f"data_offsets"
            )
    return _entries(header, 8 + length, size, unread)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *offsets]) and offsets[0] <= offsets[1]


def _entries(header: Mapping[str, Any], base: int, size: int, unread: Callable[[str], object]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    end = base
    for key, values in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (base + offset for offset in values["data_offsets"])
        entry = Entry(values["dtype"], tuple(values["shape"]), start, stop)
        skipped = unread(key)
        if entry.dtype not in BY_CODE and not skipped:
            codes = ", ".join(BY_CODE)
            raise UnknownDtype(
                f"tensor {shown(key)} is {shown(entry.dtype)}; megalite reads {codes}, not quantised weights"
            )
        if start != end or not (skipped or stop - start == BY_CODE[entry.dtype].bytes * math.prod(entry.shape)):
            raise ValueError(f"damaged: tensor {shown(key)} is not where the header says, or of another size")
        if not skipped:
            found[key] = entry
        end = stop
    if end != size:
        raise ValueError(f"cut short or too long: it has {size} bytes, its header describes {end}")
    return found
