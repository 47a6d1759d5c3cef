"""Reading: each rank takes, of the rectangles on disk, the parts that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.parallel.cuts import Shard


def load(
    folder: Path,
    manifest: dict[str, Any],
    shards: dict[str, Shard],
    kinds: dict[str, dict[str, Tensor]],
    spans: Mapping[str, range] | None = None,
) -> None:
    """Fill the tensors of `kinds` from a checkpoint saved at any topology, reading only what is needed.

    `kinds` and `spans` as in `save`; without spans all tensors are whole local ones. Padding is left as it is.
    ValueError names the file and tensor that is missing, of another shape, or damaged.
    """
    files: dict[str, Any] = {}
    for kind, tensors in kinds.items():
        for name, local in tensors.items():
            full, shard = f"{kind}.{name}", shards[name]
            entry = manifest["tensors"].get(full)
            if entry is None:
                why = "another model" if kind == "weight" else "another optimizer; take its weights alone by "
                how = (
                    "" if kind == "weight" else f"checkpoint.load={folder} checkpoint.load_optim=false in a new run_dir"
                )
                raise ValueError(f"{folder} has no tensor {full}; it is a checkpoint of {why}{how}")
            if tuple(entry["shape"]) != shard.whole_shape:
                raise ValueError(
                    f"{folder}: tensor {full} is {entry['shape']}, this model needs {list(shard.whole_shape)}; "
                    f"it is a checkpoint of another model"
                )
            held = shard.held(local, spans[name] if spans else range(shard.numel))
            for block in shard.blocks(held):
                target = shard.view(local.detach(), block, held.start)
                _fill(folder, full, entry["blocks"], block.start, target, files)


def _fill(
    folder: Path,
    full: str,
    stored: Iterable[dict[str, Any]],
    start: tuple[int, ...],
    target: Tensor,
    files: dict[str, Any],
) -> None:
    """Fill `target`, the rectangle of the whole tensor that begins at `start`, from the stored ones that meet it."""
    found = 0
    for block in stored:
        low = [max(a, b) for a, b in zip(start, block["start"])]
        high = [min(a + m, b + n) for a, m, b, n in zip(start, target.shape, block["start"], block["size"])]
        if any(a >= b for a, b in zip(low, high)):
            continue
        values = _read(folder, full, block, low, high, files)
        found += values.numel()
        with torch.no_grad():
            target[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))].copy_(values)
    if found != target.numel():
        raise ValueError(
            f"{folder}: tensor {full} has {found} of the {target.numel()} elements from {list(start)}, "
            f"{list(target.shape)} by dim; the checkpoint is damaged"
        )


def _read(
    folder: Path, full: str, block: dict[str, Any], low: Sequence[int], high: Sequence[int], files: dict[str, Any]
) -> Tensor:
    path = folder / block["file"]
    try:
        if path not in files:
            files[path] = safe_open(path, framework="pt", device="cpu")
        view = files[path].get_slice(block["key"])
        values: Tensor = view[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, block["start"]))]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: tensor {full} cannot be read ({error}); the checkpoint is damaged") from None
    return values
