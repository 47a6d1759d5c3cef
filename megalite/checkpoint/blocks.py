"""Blocks of tensors, written to safetensors files and read back one at a time, each with its SHA-256.

The safetensors library needs all tensors of a file in memory, twice. Here the header is made from sizes alone, and each
block is fetched when it is written.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.dtypes import from_torch, to_torch
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.manifest import block_key, damaged, find_block, open_file
from megalite.checkpoint.safetensors_file import Entry, make_header
from megalite.config.dtypes import BY_TORCH, DType
from megalite.parallel.cuts import Block, split

BLOCK_BYTES = 64 * 2**20
FILE_BYTES = 2**30


@dataclass(frozen=True)
class Part:
    """A block to write. `full`: the tensor's full name, as weight.embed.weight; `whole`: its whole shape."""

    full: str
    whole: tuple[int, ...]
    dtype: DType
    block: Block

    @property
    def key(self) -> str:
        return block_key(self.full, self.block.start, self.block.size)

    @property
    def bytes(self) -> int:
        return self.dtype.bytes * math.prod(self.block.size)


def parts_of(full: str, whole: Sequence[int], dtype: torch.dtype, blocks: Iterable[Block]) -> Iterator[Part]:
    """Yield the owned ones of `blocks`, split into parts of at most BLOCK_BYTES.

    Raises ValueError if `dtype` is not in config/dtypes.py.
    """
    try:
        row = from_torch(dtype)
    except ValueError as error:
        raise ValueError(f"tensor {full}: {error}") from None
    for block in blocks:
        if block.owned:
            for small in split(block, BLOCK_BYTES // row.bytes):
                yield Part(full, tuple(whole), row, small)


def write_parts(
    folder: Path, stem: str, parts: Sequence[Part], tensors: Iterable[Tensor], faults: Faults
) -> dict[str, Any]:
    """Write `parts` to files STEM-NNN.safetensors of at most FILE_BYTES, or one part if that is larger.

    `tensors`: the values of the parts, in the same order. Returns the files' entries for the manifest: {"files": {name:
    bytes}, "tensors": {full name: {shape, dtype, blocks}}}. All files are synced to the disk. Raises OSError if the
    disk refuses a write.
    """
    files: dict[str, int] = {}
    entries: dict[str, Any] = {}
    values = iter(tensors)
    for number, group in enumerate(_by_file(parts)):
        name = f"{stem}-{number:03d}.safetensors"
        with open(folder / name, "wb") as file:
            header, _ = make_header({part.key: (part.dtype, part.block.size) for part in group})
            file.write(header)
            for part in group:
                value = next(values).detach().to("cpu").contiguous()
                assert value.shape == part.block.size, (part, value.shape)
                assert from_torch(value.dtype) == part.dtype, (part, value.dtype)
                raw = _bytes(value)
                faults.at("save.before_block")
                file.write(raw[: len(raw) // 2])
                faults.at("save.in_block", file)
                file.write(raw[len(raw) // 2 :])
                new = {"shape": list(part.whole), "dtype": part.dtype.torch, "blocks": []}
                entries.setdefault(part.full, new)["blocks"].append(
                    {
                        "file": name,
                        "key": part.key,
                        "start": list(part.block.start),
                        "size": list(part.block.size),
                        "sha256": hashlib.sha256(raw).hexdigest(),
                    }
                )
            file.flush()
            faults.at("save.before_fsync")
            os.fsync(file.fileno())
            faults.at("save.after_fsync")
            files[name] = file.tell()
    return {"files": files, "tensors": entries}


def _by_file(parts: Sequence[Part]) -> Iterator[list[Part]]:
    group: list[Part] = []
    room = FILE_BYTES
    for part in parts:
        if group and part.bytes > room:
            yield group
            group, room = [], FILE_BYTES
        group.append(part)
        room -= part.bytes
    if group:
        yield group


def _bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor of any dtype. By way of uint8, since numpy has no bfloat16."""
    raw: Any = values.flatten().view(torch.uint8).numpy()
    return memoryview(raw)


class BlockReader:
    """Reads blocks from the files of one checkpoint. `verify`: compare each with its SHA-256."""

    def __init__(self, folder: Path, manifest: dict[str, Any], verify: bool = True) -> None:
        self.folder, self.manifest, self.verify = folder, manifest, verify
        self._open: dict[str, tuple[BufferedReader, dict[str, Entry]]] = {}

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file, _header in self._open.values():
            file.close()

    def read(self, full: str, block: dict[str, Any]) -> Tensor:
        """The values of one block of tensor `full`. Raises Damaged, naming file and tensor."""
        file, begin, length = self.find(full, block)
        values = torch.empty(block["size"], dtype=to_torch(BY_TORCH[self.manifest["tensors"][full]["dtype"]]))
        try:
            file.seek(begin)
            count = file.readinto(_bytes(values))
            if count != length:
                raise ValueError(f"{count} bytes of {length}")
            if self.verify and hashlib.sha256(_bytes(values)).hexdigest() != block["sha256"]:
                raise ValueError(f"the elements from {block['start']} do not match their checksum")
        except (OSError, ValueError) as error:
            raise damaged(self.folder / block["file"], full, error) from None
        return values

    def find(self, full: str, block: dict[str, Any]) -> tuple[BufferedReader, int, int]:
        """(open file, first byte, bytes) of a block, checked against its file's header. Raises Damaged as in `read`."""
        name = block["file"]
        try:
            if name not in self._open:
                self._open[name] = open_file(self.folder / name, self.manifest["files"][name])
            file, header = self._open[name]
            return file, *find_block(header, block, self.manifest["tensors"][full]["dtype"])
        except (OSError, ValueError) as error:
            raise damaged(self.folder / name, full, error) from None
