"""Reading: each rank takes, of the blocks on disk, the ranges that its own shards hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.parallel.cuts import Shard


def load(folder: Path, manifest: dict[str, Any], shards: dict[str, Shard], kinds: dict[str, dict[str, Tensor]]) -> None:
    """Fill the local tensors of `kinds` from a checkpoint saved at any topology, reading only what is needed.

    `kinds` as in `save`. Padding rows are left as they are. ValueError names the file and tensor that is missing, of
    another shape, or damaged.
    """
    files: dict[str, Any] = {}
    for kind, tensors in kinds.items():
        for name, local in tensors.items():
            full, shard = f"{kind}.{name}", shards[name]
            entry = manifest["tensors"].get(full)
            if entry is None:
                raise ValueError(f"{folder} has no tensor {full}; it is a checkpoint of another model")
            if tuple(entry["shape"]) != shard.whole_shape:
                raise ValueError(
                    f"{folder}: tensor {full} is {entry['shape']}, this model needs {list(shard.whole_shape)}; "
                    f"it is a checkpoint of another model"
                )
            _fill(folder, full, entry["blocks"], shard, local.detach(), files)


def _fill(
    folder: Path, full: str, blocks: Iterable[dict[str, Any]], shard: Shard, local: Tensor, files: dict[str, Any]
) -> None:
    blocks = list(blocks)
    for piece in shard.pieces:
        found = 0
        for block in blocks:
            low = max(piece.start, block["start"])
            high = min(piece.start + piece.length, block["start"] + block["length"])
            if low >= high:
                continue
            found += high - low
            rows = _rows(folder, full, block, low - block["start"], high - block["start"], files)
            with torch.no_grad():
                local.narrow(shard.dim, piece.offset + low - piece.start, high - low).copy_(rows)
        if found != piece.length:
            raise ValueError(
                f"{folder}: tensor {full} has {found} of the rows {piece.start} to {piece.start + piece.length}; "
                f"the checkpoint is damaged"
            )


def _rows(folder: Path, full: str, block: dict[str, Any], low: int, high: int, files: dict[str, Any]) -> Tensor:
    path = folder / block["file"]
    try:
        if path not in files:
            files[path] = safe_open(path, framework="pt", device="cpu")
        view = files[path].get_slice(block["key"])
        rows: Tensor = view[low:high] if block["dim"] == 0 else view[:, low:high]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: tensor {full} cannot be read ({error}); the checkpoint is damaged") from None
    return rows
