"""Check a manifest and the headers of its files. No torch here, so that damage is reported before torch loads.

A manifest lists files with their sizes, and for each tensor its blocks, each with its SHA-256. It also contains a
digest of itself. Digests find damage and careless edits; they do not protect against forgery.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from megalite.checkpoint.safetensors_file import METADATA, Entry, read_header
from megalite.config.dtypes import BY_TORCH

FORMAT = 3
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")
MANIFEST_BYTES = 2**30


class Damaged(ValueError):
    """A checkpoint is not what was written. The message names the file and, if known, the tensor."""


class Removed(ValueError):
    """A checkpoint was removed while it was being read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder} was removed while it was being read: its run keeps the newest checkpoints only; read a newer "
            f"one, or keep more with checkpoint.keep"
        )


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its digest, as compact JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def block_key(full: str, start: Sequence[int], size: Sequence[int]) -> str:
    """The key of a block in its file: `weight.embed.weight[0:64,0:128]`."""
    return f"{full}[{','.join(f'{a}:{a + n}' for a, n in zip(start, size))}]"


def check_manifest(manifest: dict[str, Any]) -> None:
    """Check digest, file names and blocks. Raises ValueError unless every element is stored exactly once."""
    _require(manifest.get("digest") == digest(manifest), "it was changed after it was written: its digest is wrong")
    _require(_is_size(manifest.get("step")), f"step is {manifest.get('step')!r}, not a count")
    config = manifest.get("config")
    _require(isinstance(config, dict) and isinstance(config.get("model"), dict), "config or its model is missing")
    files, tensors = manifest.get("files"), manifest.get("tensors")
    _require(isinstance(files, dict) and isinstance(tensors, dict), "files or tensors are missing")
    assert isinstance(files, dict)
    assert isinstance(tensors, dict)
    for name, size in files.items():
        _require(bool(NAME.fullmatch(name)), f"{name!r} is not a file name")
        _require(_is_size(size), f"file {name} has size {size!r}")
    for name, tensor in tensors.items():
        _require(bool(NAME.fullmatch(name)), f"{name!r} is not the name of a tensor")
        _check_tensor(name, tensor, files)
    room = dict(files)  # bytes left, so that a shape cannot claim more memory than there are bytes on the disk
    for name, tensor in tensors.items():
        for block in tensor["blocks"]:
            named = block_key(name, block["start"], block["size"])
            _require(block["key"] == named, f"tensor {name}: block {named} has the key {block['key']}")
            room[block["file"]] -= BY_TORCH[tensor["dtype"]].bytes * math.prod(block["size"])
            _require(room[block["file"]] >= 0, f"tensor {name}: its blocks are larger than file {block['file']}")


def _check_tensor(name: str, tensor: Any, files: dict[str, int]) -> None:
    _require(isinstance(tensor, dict) and isinstance(tensor.get("blocks"), list), f"tensor {name} has no blocks")
    shape, where = tensor.get("shape"), f"tensor {name}"
    _require(_are_sizes(shape) and tensor.get("dtype") in BY_TORCH, f"{where} has no shape or no known dtype")
    spans = []
    for block in tensor["blocks"]:
        keys = ("file", "key", "sha256")
        _require(isinstance(block, dict) and all(isinstance(block.get(k), str) for k in keys), f"{where}: {block}")
        start, size = block.get("start"), block.get("size")
        _require(_are_sizes(start) and _are_sizes(size), f"{where}: a block has no start or size")
        _require(len(start) == len(size) == len(shape), f"{where}: a block has {len(start)} dims of {len(shape)}")
        stop = [a + n for a, n in zip(start, size)]
        _require(
            min(size) > 0 and all(b <= n for b, n in zip(stop, shape)),
            f"{where}: a block from {start} to {stop} is outside {shape}",
        )
        _require(block["file"] in files, f"{where}: {block['file']} is not in the list of files")
        spans.append((start, stop))
    _require_cover(where, shape, spans)


def _require_cover(where: str, shape: list[int], spans: list[tuple[list[int], list[int]]]) -> None:
    """Raise ValueError unless the rectangles cover `shape` exactly once: none overlap and their volumes add up."""
    reaching: list[tuple[list[int], list[int]]] = []  # earlier ones that extend into the rows of the current one
    for start, stop in sorted(spans):
        reaching = [(a, b) for a, b in reaching if b[0] > start[0]]
        for a, b in reaching:
            disjoint = any(b[d] <= start[d] or stop[d] <= a[d] for d in range(len(shape)))
            _require(disjoint, f"{where}: the elements from {start} are stored twice")
        reaching.append((start, stop))
    stored = sum(math.prod(b - a for a, b in zip(start, stop)) for start, stop in spans)
    _require(stored == math.prod(shape), f"{where}: {stored} of {math.prod(shape)} elements are stored")


def open_plain(path: Path) -> BufferedReader:
    """Open a file to read. Raises OSError if it is missing or a link, ValueError if it is not a regular file."""
    # without O_NONBLOCK, opening a pipe that nobody writes to would hang
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def open_file(path: Path, expected: int) -> tuple[BufferedReader, dict[str, Entry]]:
    """A safetensors file of `expected` bytes, open, and its tensors by key.

    Raises OSError if the file is missing or a link, ValueError if its size or its header is wrong.
    """
    file = open_plain(path)
    try:
        size = os.fstat(file.fileno()).st_size
        _require(size == expected, f"the file has {size} bytes of {expected}")
        return file, read_header(file, metadata=METADATA)
    except BaseException:
        file.close()
        raise


def find_block(entries: dict[str, Entry], block: dict[str, Any], dtype: str) -> tuple[int, int]:
    """(first byte, bytes) of a block in its file. Raises ValueError if the file's header and the manifest disagree."""
    entry = entries.get(block["key"])
    if entry is None:
        raise ValueError(f"{block['key']} is not in the file")
    same = (entry.dtype, list(entry.shape)) == (BY_TORCH[dtype].code, block["size"])
    _require(same, f"{block['key']} has another shape or dtype in the file")
    return entry.start, entry.stop - entry.start


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Check that every file has its size, and every block is in its file's header. Reads no tensor. Raises Damaged."""
    headers: dict[str, dict[str, Entry]] = {}
    for full, tensor in manifest["tensors"].items():
        for block in tensor["blocks"]:
            name = block["file"]
            try:
                if name not in headers:
                    file, headers[name] = open_file(folder / name, manifest["files"][name])
                    file.close()
                find_block(headers[name], block, tensor["dtype"])
            except (OSError, ValueError) as error:
                raise damaged(folder / name, full, error) from None


def damaged(path: Path, full: str, error: Exception) -> Damaged | Removed:
    """The exception to raise if tensor `full` cannot be read from file `path`."""
    if not os.path.lexists(path.parent):
        return Removed(path.parent)
    return Damaged(f"{path}: tensor {full} cannot be read ({reason(error)}); the checkpoint is damaged")


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    return one_line(error.strerror if isinstance(error, OSError) and error.strerror else str(error))


def one_line(text: str) -> str:
    """Text from the disk for a message: one printable line of at most 300 characters."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return line if len(line) <= 300 else f"{line[:200]}...{line[-80:]}"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_size, value))
