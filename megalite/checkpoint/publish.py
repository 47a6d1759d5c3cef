"""The steps of a save on the disk, in an order that survives a kill between any two of them.

Files, then the manifest, then the folder's name, then the pointer; each is synced before the next begins. A
half-finished save leaves a hidden folder, which the next run removes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megalite
from megalite.checkpoint import lock
from megalite.checkpoint.blocks import Part, write_parts
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import BUILDING, complete, read_manifest, step_of
from megalite.checkpoint.manifest import FORMAT, check_files, digest
from megalite.checkpoint.retain import remove, surplus
from megalite.config import Config
from megalite.watch.disk import write_whole_text


def write_rank(building: Path, rank: int, parts: list[Part], tensors: Iterable[Tensor], faults: Faults) -> None:
    """Write this rank's files, then its part: a JSON file of their entries for the manifest."""
    faults.at("save.before_folder")
    building.mkdir(parents=True, exist_ok=True)
    faults.at("save.after_folder")
    written = write_parts(building, f"rank-{rank:05d}", parts, tensors, faults)
    faults.at("save.before_part")
    # written last and atomically: whoever sees this file sees everything that the rank has written
    write_whole_text(_part(building, rank), json.dumps(written))
    faults.at("save.after_part")


def _part(building: Path, rank: int) -> Path:
    return building / f"rank-{rank:05d}.json"


def missing_parts(building: Path, ranks: int) -> list[int]:
    """The ranks, of `ranks`, whose parts this process does not see in the folder yet."""
    names = set(os.listdir(building))
    return [rank for rank in range(ranks) if _part(building, rank).name not in names]


def publish(building: Path, final: Path, config: Config, state: dict[str, Any], faults: Faults) -> None:
    """Write the manifest from the parts of all ranks, and rename the folder to `final`.

    Raises Damaged if the tensors are not those that `config` needs; `final` is then unchanged.
    """
    files: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    for path in sorted(building.glob("rank-*.json")):
        written = json.loads(path.read_text())
        files |= written["files"]
        for name, tensor in written["tensors"].items():
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
    faults.at("save.before_manifest")
    with open(building / "manifest.json", "wb") as file:
        file.write(text[: len(text) // 2])
        faults.at("save.in_manifest", file)
        file.write(text[len(text) // 2 :])
        file.flush()
        faults.at("save.before_manifest_fsync")
        os.fsync(file.fileno())
    sync(building)
    faults.at("save.after_manifest")
    # finds missing tensors, and changes made by other processes, before the folder gets its name
    check_files(building, read_manifest(building))
    faults.at("save.before_rename")
    aside = final.with_name(f"replaced-{final.name}")
    if final.exists():
        final.rename(aside)
    building.rename(final)
    sync(final.parent)
    faults.at("save.after_rename")
    shutil.rmtree(aside, ignore_errors=True)


def point_at(final: Path, faults: Faults) -> None:
    """Let the file `latest`, a hint for people, name the checkpoint `final`."""
    faults.at("save.before_pointer")
    pointer = final.parent / f"{BUILDING}latest"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    sync(pointer)
    faults.at("save.in_pointer")
    pointer.rename(final.parent / "latest")
    sync(final.parent)


def prune(final: Path, keep: int, keep_every: int, faults: Faults) -> None:
    """Remove old checkpoints, up to `final`: all but the newest `keep` (0: none is removed).

    Those whose step is a multiple of `keep_every` (0: no step) are kept too.
    """
    faults.at("save.before_prune")
    finished = [folder for folder in complete(final.parent.parent) if step_of(folder) <= step_of(final)]
    for old in surplus(finished, keep, keep_every):
        remove(old, lambda: faults.at("save.in_prune"))
    faults.at("save.after_prune")


def remove_leftovers(run_dir: Path) -> None:
    """Remove the hidden folders that killed runs have left in `run_dir` while saving or pruning."""
    for path in (run_dir / "checkpoints").glob(f"{BUILDING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder to write into; when the block ends it is synced and renamed to `target`.

    `target` may exist if it is empty. If the block raises, the hidden folder is removed. Raises ConfigError if another
    process is writing the same target.
    """
    building = target.with_name(f"{BUILDING}{target.name}")
    building.mkdir(parents=True, exist_ok=True)
    lock.hold(building)
    try:
        for left in building.iterdir():  # from a process that was killed
            if left.name != lock.NAME:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield building
        lock.release(building)
        for path in (*building.rglob("*"), building):
            sync(path)
        if target.exists():
            target.rmdir()
        building.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """fsync a file, or the directory entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
