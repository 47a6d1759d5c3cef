"""Writing: every rank its own blocks into a temporary folder, which gets its name when all of it is on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import megalite
from megalite.checkpoint.folder import FORMAT, complete, step_folder
from megalite.config import Config
from megalite.parallel.cuts import Shard
from megalite.parallel.mesh import Mesh


def save(
    run_dir: Path,
    config: Config,
    mesh: Mesh,
    shards: dict[str, Shard],
    spans: Mapping[str, range],
    kinds: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
) -> Path:
    """Write a checkpoint of `kinds` ({"weight": {name: tensor}, "exp_avg": …}) and give back its folder.

    A tensor is a local one, or the part `spans[name]` of it, flattened. Each rank writes what it owns of `spans`, the
    elements of the flattened local tensors that it answers for. `state` holds plain values, among them step and
    consumed_samples. Collective: every rank of the world calls. Raises OSError where the disk refuses; the previous
    checkpoint is then untouched.
    """
    final = step_folder(run_dir, state["step"])
    building = final.with_name(f".building-{final.name}")
    if mesh.world.rank == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    mesh.world.barrier()
    _write_blocks(building, mesh.world.rank, shards, spans, kinds)
    mesh.world.barrier()
    if mesh.world.rank == 0:
        tensors: dict[str, Any] = {}
        for part in sorted(building.glob("rank-*.json")):
            for name, tensor in json.loads(part.read_text()).items():
                tensors.setdefault(name, {**tensor, "blocks": []})["blocks"] += tensor["blocks"]
            part.unlink()
        manifest = {
            "format": FORMAT,
            **state,
            "versions": {"megalite": megalite.__version__, "torch": torch.__version__},
            "config": dataclasses.asdict(config),
            "tensors": tensors,
        }
        _write_text(building / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))
        _publish(building, final, config.checkpoint.keep)
    mesh.world.barrier()
    return final


def _write_blocks(
    folder: Path,
    rank: int,
    shards: dict[str, Shard],
    spans: Mapping[str, range],
    kinds: dict[str, dict[str, Tensor]],
) -> None:
    blocks: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    file = f"rank-{rank:05d}.safetensors"
    for kind, tensors in kinds.items():
        for name, span in spans.items():
            if name not in tensors:
                continue
            shard, tensor = shards[name], tensors[name]
            full, dtype = f"{kind}.{name}", str(tensor.dtype).removeprefix("torch.")
            first = shard.held(tensor, span).start
            for block in shard.blocks(span):
                if not block.owned:
                    continue
                key = ".".join([full, *map(str, block.start)])
                blocks[key] = shard.view(tensor.detach(), block, first).cpu().contiguous()
                entry = entries.setdefault(full, {"shape": list(shard.whole_shape), "dtype": dtype, "blocks": []})
                entry["blocks"].append({"file": file, "key": key, "start": block.start, "size": block.size})
    if blocks:
        save_file(blocks, folder / file)
        _sync(folder / file)
        _write_text(folder / f"rank-{rank:05d}.json", json.dumps(entries))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(building: Path, final: Path, keep: int) -> None:
    """Give the folder its name, then move the pointer, then let the oldest go."""
    _sync(building)
    if final.exists():
        shutil.rmtree(final)
    building.rename(final)
    _sync(final.parent)
    pointer = final.parent / ".latest.building"
    _write_text(pointer, final.name + "\n")
    pointer.rename(final.parent / "latest")
    run_dir = final.parent.parent
    for old in complete(run_dir)[:-keep] if keep else []:
        shutil.rmtree(old)
