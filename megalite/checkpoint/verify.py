"""Compare every byte of a checkpoint with its checksums, and list all damage. No torch here."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from megalite.checkpoint.manifest import Damaged, Removed, damaged, find_block, open_file
from megalite.checkpoint.safetensors_file import Entry

# read and hashed at a time: about the size of a core's cache
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Verified:
    """How much was read, and a line per damaged block."""

    blocks: int
    bytes: int
    damages: list[str]


def verify(folder: Path, manifest: dict[str, Any], threads: int = 0) -> Verified:
    """Read every block of a checkpoint, one file per thread. `manifest`: what `read_manifest` returned for it.

    `threads`: 0 for the number of cores. That every element is stored exactly once is checked by `read_manifest`. Files
    that the manifest does not list are ignored. Memory: CHUNK_BYTES per thread. Raises Removed if the checkpoint is
    removed while it is read.
    """
    blocks_of: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name in manifest["files"]}
    for full, tensor in manifest["tensors"].items():
        for block in tensor["blocks"]:
            blocks_of[block["file"]].append((full, block))

    def verify_one(name: str) -> Verified:
        return _verify_file(folder / name, manifest, blocks_of[name])

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:  # hashing and reading release the interpreter lock
        files = list(pool.map(verify_one, sorted(blocks_of)))
    damages = [line for file in files for line in file.damages]
    if damages and not os.path.lexists(folder):
        raise Removed(folder)
    return Verified(sum(file.blocks for file in files), sum(file.bytes for file in files), damages)


def _verify_file(path: Path, manifest: dict[str, Any], blocks: list[tuple[str, dict[str, Any]]]) -> Verified:
    damages: list[str] = []
    total = 0
    try:
        file, header = open_file(path, manifest["files"][path.name])
    except (OSError, ValueError) as error:
        names = dict.fromkeys(full for full, _ in blocks) or {"(none)": None}
        return Verified(0, 0, [str(damaged(path, full, error)) for full in names])
    with file:
        for full, block in blocks:
            try:
                total += _verify_block(file, header, block, manifest["tensors"][full]["dtype"])
            except (OSError, ValueError) as error:
                damages.append(str(damaged(path, full, error)))
    return Verified(len(blocks), total, damages)


def _verify_block(file: BufferedReader, header: dict[str, Entry], block: dict[str, Any], dtype: str) -> int:
    begin, length = find_block(header, block, dtype)
    file.seek(begin)
    sha256, left, buffer = hashlib.sha256(), length, memoryview(bytearray(min(length, CHUNK_BYTES)))
    while left:
        count = file.readinto(buffer[: min(left, CHUNK_BYTES)])
        if not count:
            raise ValueError(f"{length - left} bytes of {length}")
        sha256.update(buffer[:count])
        left -= count
    if sha256.hexdigest() != block["sha256"]:
        raise ValueError(f"the elements from {block['start']} do not match their checksum")
    return length


def require_good(folder: Path, manifest: dict[str, Any]) -> None:
    """Verify every block. Raises Damaged with the first damage and the number of others."""
    damages = verify(folder, manifest).damages
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise Damaged(damages[0] + more)
