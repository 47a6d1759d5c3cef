"""Writing: every rank its own blocks into a temporary folder, which gets its name when all of it is on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megalite
from megalite.checkpoint.blocks import Part, parts_of, write_parts
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import BUILDING, building_folder, complete, read_manifest, step_folder
from megalite.checkpoint.manifest import FORMAT, NAME, check_files, digest
from megalite.config import Config
from megalite.parallel.cuts import Shard, uncut
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
    building, rank = building_folder(final), mesh.world.rank
    faults = Faults(rank)
    if rank == 0:
        shutil.rmtree(building, ignore_errors=True)
    mesh.world.barrier()
    owned = list(own_parts(shards, spans, kinds))
    write_rank(building, rank, [part for part, _ in owned], (view for _, view in owned), faults)
    mesh.world.barrier()
    if rank == 0:
        publish(building, final, config, state, faults)
        point_at(final, faults)
        prune(final, config.checkpoint.keep, faults)
    mesh.world.barrier()
    return final


def write_whole(
    folder: Path,
    config: Config,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    get: Callable[[str], Tensor],
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint `folder` from one process, tensor by tensor: `get(full name)` is asked for each in turn.

    `tensors`: dtype and shape by full name, as `weight.embed.weight`. Memory: the largest tensor and one block. `state`
    as in `save`. ValueError where the folder exists or a tensor is not what was announced; nothing is left then.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder")
    parts = [
        part
        for full, (dtype, shape) in tensors.items()
        for part in parts_of(full, shape, dtype, uncut(shape, 0).blocks())
    ]

    def values() -> Iterator[Tensor]:
        name, whole = "", torch.empty(0)
        for part in parts:
            if part.full != name:
                del whole  # never two at once
                name, whole = part.full, get(part.full)
                found, announced = (whole.dtype, tuple(whole.shape)), tensors[name]
                if found != (announced[0], tuple(announced[1])):
                    raise ValueError(f"tensor {name} is {found}, not {announced} as announced")
            yield whole[tuple(slice(a, a + n) for a, n in zip(part.block.start, part.block.size))]

    building, faults = building_folder(folder), Faults(0)
    shutil.rmtree(building, ignore_errors=True)
    try:
        write_rank(building, 0, parts, values(), faults)
        publish(building, folder, config, state, faults)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder


def own_parts(
    shards: dict[str, Shard], spans: Mapping[str, range], kinds: dict[str, dict[str, Tensor]]
) -> Iterator[tuple[Part, Tensor]]:
    """What this rank writes: each part with the view of its values."""
    for kind, tensors in kinds.items():
        for name, tensor in tensors.items():
            if name not in spans:
                continue
            shard, span = shards[name], spans[name]
            first = shard.held(tensor, span).start
            for part in parts_of(f"{kind}.{name}", shard.whole_shape, tensor.dtype, shard.blocks(span)):
                yield part, shard.view(tensor.detach(), part.block, first)


def write_rank(building: Path, rank: int, parts: list[Part], tensors: Iterator[Tensor], faults: Faults) -> None:
    """This rank's files, and beside them what the manifest will say of them."""
    faults.at("folder.before")
    building.mkdir(parents=True, exist_ok=True)
    faults.at("folder.after")
    written = write_parts(building, f"rank-{rank:05d}", parts, tensors, faults)
    faults.at("part.before")
    _write_text(building / f"rank-{rank:05d}.json", json.dumps(written))
    faults.at("part.after")


def publish(building: Path, final: Path, config: Config, state: dict[str, Any], faults: Faults) -> None:
    """Make the manifest out of what the ranks have written, and give the folder its name."""
    files: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    for path in sorted(building.glob("rank-*.json")):
        written = json.loads(path.read_text())
        files |= written["files"]
        for name, tensor in written["tensors"].items():
            assert NAME.fullmatch(name), name
            tensors.setdefault(name, {**tensor, "blocks": []})["blocks"] += tensor["blocks"]
        path.unlink()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        **state,
        "versions": {"megalite": megalite.__version__, "torch": torch.__version__},
        "config": dataclasses.asdict(config),
        "files": files,
        "tensors": tensors,
    }
    manifest = {"digest": digest(manifest), **manifest}
    text = json.dumps(manifest, indent=1, ensure_ascii=False).encode()
    faults.at("manifest.before")
    with open(building / "manifest.json", "wb") as file:
        file.write(text[: len(text) // 2])
        faults.at("manifest.in", file)
        file.write(text[len(text) // 2 :])
        file.flush()
        faults.at("manifest.before_fsync")
        os.fsync(file.fileno())
    sync(building)
    faults.at("manifest.after")
    # what another process changed or lost since is found before the folder has its name
    check_files(building, read_manifest(building))
    faults.at("rename.before")
    if final.exists():
        aside = final.with_name(f"{BUILDING}replaced-{final.name}")
        final.rename(aside)
        building.rename(final)
        shutil.rmtree(aside)
    else:
        building.rename(final)
    sync(final.parent)
    faults.at("rename.after")


def point_at(final: Path, faults: Faults) -> None:
    """Move the pointer `latest`, which is only a hint."""
    faults.at("pointer.before")
    pointer = final.parent / f"{BUILDING}latest"
    _write_text(pointer, final.name + "\n")
    faults.at("pointer.in")
    pointer.rename(final.parent / "latest")
    sync(final.parent)


def prune(final: Path, keep: int, faults: Faults) -> None:
    """Let the oldest checkpoints of the run go, those before `final`, so that `keep` are left."""
    faults.at("prune.before")
    for old in complete(final.parent.parent)[:-keep] if keep else []:
        shutil.rmtree(old)
    faults.at("prune.after")


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)
