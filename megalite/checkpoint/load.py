"""Read a checkpoint: each rank reads, of the blocks on disk, the parts that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.blocks import BlockReader
from megalite.checkpoint.dtypes import to_torch
from megalite.config.dtypes import BY_TORCH
from megalite.parallel.cuts import Shard


def load(
    folder: Path,
    manifest: dict[str, Any],
    shards: dict[str, Shard],
    kinds: dict[str, dict[str, Tensor]],
    spans: Mapping[str, range] | None = None,
    verify: bool = True,
) -> None:
    """Fill the tensors of `kinds` in place from a checkpoint saved at any topology, reading only the blocks needed.

    `kinds` and `spans` as in `save`; without spans every tensor is a whole local one. Padding is left unchanged.
    `verify`: compare each block that is read with its SHA-256. Raises ValueError if a tensor is missing or has another
    shape; Damaged, naming file and tensor, if a block is not what was written.
    """
    with BlockReader(folder, manifest, verify) as reader:
        for kind, tensors in kinds.items():
            for name, local in tensors.items():
                full, shard = f"{kind}.{name}", shards[name]
                stored = _find(folder, manifest, kind, full, shard.whole_shape)
                held = shard.held(local, spans[name] if spans else range(shard.numel))
                rectangles = [
                    (block.start, shard.view(local.detach(), block, held.start)) for block in shard.blocks(held)
                ]
                for block in stored:
                    _fill(reader, full, block, rectangles)


def read_tensor(folder: Path, manifest: dict[str, Any], full: str, verify: bool = True) -> Tensor:
    """Read one whole tensor to the CPU by its full name, as weight.embed.weight. `verify` and errors as in `load`."""
    entry = manifest["tensors"].get(full)
    if entry is None:
        raise ValueError(f"{folder} has no tensor {full}")
    with BlockReader(folder, manifest, verify) as reader:
        for block in entry["blocks"]:
            reader.find(full, block)  # before allocating what a manifest only claims
        whole = torch.empty(entry["shape"], dtype=to_torch(BY_TORCH[entry["dtype"]]))
        for block in entry["blocks"]:
            _fill(reader, full, block, [((0,) * whole.dim(), whole)])
    return whole


def _find(folder: Path, manifest: dict[str, Any], kind: str, full: str, shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """The stored blocks of a tensor. Raises ValueError if it is missing or its shape is not `shape`."""
    entry = manifest["tensors"].get(full)
    if entry is None:
        why = "another model" if kind == "weight" else "another optimizer; take its weights alone by "
        if kind == "momentum" and f"exp_avg.{full.removeprefix('momentum.')}" in manifest["tensors"]:
            # earlier versions updated the feed-forward matrices of models without a gate by AdamW
            why = "a run that updated this matrix by AdamW; take its weights alone by "
        how = "" if kind == "weight" else f"checkpoint.load={folder} checkpoint.load_optim=false in a new run_dir"
        raise ValueError(f"{folder} has no tensor {full}; it is a checkpoint of {why}{how}")
    if tuple(entry["shape"]) != shape:
        raise ValueError(
            f"{folder}: tensor {full} has shape {entry['shape']}, this model needs {list(shape)}; "
            f"it is a checkpoint of another model"
        )
    blocks: list[dict[str, Any]] = entry["blocks"]
    return blocks


def _fill(
    reader: BlockReader, full: str, block: dict[str, Any], rectangles: list[tuple[tuple[int, ...], Tensor]]
) -> None:
    """Copy a stored block into each of `rectangles` (first index in the whole tensor, view) that it overlaps."""
    values = None
    for start, target in rectangles:
        low = [max(a, b) for a, b in zip(start, block["start"])]
        high = [min(a + m, b + n) for a, m, b, n in zip(start, target.shape, block["start"], block["size"])]
        if any(a >= b for a, b in zip(low, high)):
            continue
        values = reader.read(full, block) if values is None else values
        source = values[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, block["start"]))]
        with torch.no_grad():
            target[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))].copy_(source)
