"""The steps of a save on the disk, in the order that lets a run die between any two of them.

Files, then the manifest, then the folder's name, then the pointer; each is on the disk before the next. What a
half-finished save leaves behind is hidden by its name, and removed by the next run.
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
    """This rank's files, and beside them what the manifest will say of them."""
    faults.at("save.before_folder")
    building.mkdir(parents=True, exist_ok=True)
    faults.at("save.after_folder")
    written = write_parts(building, f"rank-{rank:05d}", parts, tensors, faults)
    faults.at("save.before_part")
    # the last thing that a rank does, and all at once: who sees this file sees all that the rank has written
    write_whole_text(_part(building, rank), json.dumps(written))
    faults.at("save.after_part")


def _part(building: Path, rank: int) -> Path:
    return building / f"rank-{rank:05d}.json"


def missing_parts(building: Path, ranks: int) -> list[int]:
    """The ranks of `ranks` that have not yet written all of theirs, as far as this process sees the folder."""
    there = set(os.listdir(building))
    return [rank for rank in range(ranks) if _part(building, rank).name not in there]


def publish(building: Path, final: Path, config: Config, state: dict[str, Any], faults: Faults) -> None:
    """Make the manifest out of what the ranks have written, and give the folder its name.

    Damaged unless the configuration finds in it all that it needs: `final` is then not touched.
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
    # what is missing, and what another process has changed since, is found before the folder has its name
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
    """Move the pointer `latest`, which is only a hint."""
    faults.at("save.before_pointer")
    pointer = final.parent / f"{BUILDING}latest"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    sync(pointer)
    faults.at("save.in_pointer")
    pointer.rename(final.parent / "latest")
    sync(final.parent)


def prune(final: Path, keep: int, keep_every: int, faults: Faults) -> None:
    """Let old checkpoints go: of those up to `final`, which is whole, all but the newest `keep` (0: none go).

    Those whose step is a multiple of `keep_every` (0: none) stay too.
    """
    faults.at("save.before_prune")
    here = [folder for folder in complete(final.parent.parent) if step_of(folder) <= step_of(final)]
    for old in surplus(here, keep, keep_every):
        remove(old, lambda: faults.at("save.in_prune"))
    faults.at("save.after_prune")


def remove_leftovers(run_dir: Path) -> None:
    """Remove what runs that died have left of saves and prunes in `run_dir`."""
    for path in (run_dir / "checkpoints").glob(f"{BUILDING}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to write into; once the block has ended it is on the disk and named `target`.

    `target` may be there and empty. Where the block fails nothing is left. ConfigError where another process is writing
    the same.
    """
    building = target.with_name(f"{BUILDING}{target.name}")
    building.mkdir(parents=True, exist_ok=True)
    lock.hold(building)
    try:
        for left in building.iterdir():  # of a process that was killed
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
    """Have the disk hold a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
