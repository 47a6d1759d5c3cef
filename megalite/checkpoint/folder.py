"""The folders of checkpoints: which are finished, which one a path means, and its manifest. No torch here.

RUN/checkpoints/step-00000100/manifest.json   step, samples, config, files, and the blocks of every tensor
RUN/checkpoints/step-00000100/rank-00000-000.safetensors   the blocks that rank 0 owns, 1 GiB per file
RUN/checkpoints/latest                        name of the newest; a hint for people, never read
RUN/checkpoints/.building-step-00000200/      being written, or left by a run that died
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

from megalite.checkpoint.contents import OtherVersion, check_contents
from megalite.checkpoint.manifest import (
    FORMAT,
    MANIFEST_BYTES,
    Damaged,
    Removed,
    check_manifest,
    one_line,
    open_plain,
    reason,
)

STEP = re.compile(r"step-(\d{8,})")
BUILDING = ".building-"


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def building_folder(final: Path) -> Path:
    """Where a checkpoint is written before it gets its final name."""
    return final.with_name(BUILDING + final.name)


def complete(run_dir: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first. A folder gets its final name only when it is complete."""
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    steps = sorted((int(m[1]), name) for name in names if (m := STEP.fullmatch(name)))
    return [folder / name for _, name in steps if (folder / name / "manifest.json").is_file()]


def before(checkpoint: Path) -> list[Path]:
    """The older checkpoints of the same run, newest first."""
    return [f for f in reversed(complete(checkpoint.parents[1])) if step_of(f) < step_of(checkpoint)]


def after(checkpoint: Path) -> list[Path]:
    """The newer checkpoints of the same run, oldest first."""
    return [f for f in complete(checkpoint.parents[1]) if step_of(f) > step_of(checkpoint)]


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that it is kept but no longer found. Returns its new path."""
    places = (checkpoint.with_name(f"damaged-{n}-{checkpoint.name}") for n in itertools.count(1))
    return checkpoint.rename(next(place for place in places if not place.exists()))


def latest(run_dir: Path) -> Path | None:
    """The newest finished checkpoint of a run folder; None if there is none."""
    found = complete(run_dir)
    return found[-1] if found else None


def find(path: str | Path) -> Path:
    """The checkpoint that `path` means: a step folder itself, or the newest of a run folder.

    Raises ValueError if there is none.
    """
    folder = Path(path)
    if (folder / "manifest.json").is_file():
        return folder
    newest = latest(folder)
    if newest is None:
        what = "no such folder" if not folder.is_dir() else "neither a checkpoint nor a run folder with one"
        if (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is a Hugging Face folder, not a run folder; train from it with model.from_hf={folder}, or "
                f"convert it with tools/checkpoint.py convert --from hf {folder} --to megalite NEW"
            )
        raise ValueError(f"{folder}: {what}; name a run folder or one of its checkpoints/step-NNNNNNNN")
    return newest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint.

    Raises Damaged, naming the file; Removed if the checkpoint's folder is gone; ValueError if another version of
    megalite wrote it.
    """
    path = folder / "manifest.json"
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MANIFEST_BYTES:
                raise ValueError(f"it has {size} bytes, more than the {MANIFEST_BYTES} of any manifest")
            manifest = json.loads(file.read().decode())
        if not isinstance(manifest, dict):
            raise ValueError("it is not a JSON object")
        other = manifest.get("format")
        if not isinstance(other, int):
            raise ValueError("it has no format number")
        if other == FORMAT:
            check_manifest(manifest)
            if STEP.fullmatch(folder.name) and manifest["step"] != step_of(folder):
                raise ValueError(f"it says step {manifest['step']}, its folder's name says {step_of(folder)}")
            check_contents(manifest)
    except OtherVersion as error:
        raise ValueError(f"{path}: {error}; use the version that wrote it") from None
    except (OSError, ValueError, RecursionError) as error:
        if not os.path.lexists(folder):
            raise Removed(folder) from None
        raise Damaged(f"{path}: not a manifest ({reason(error)}); the checkpoint is damaged") from None
    if other != FORMAT:
        raise ValueError(
            f"{path} has format {other}, this megalite reads format {FORMAT}; use the version that wrote it"
        )
    return manifest


def check_model(manifest: dict[str, Any], model: dict[str, Any], folder: Path, grows: bool = False) -> None:
    """Raise ValueError if the checkpoint's model is not `model`, the resolved model section as a dict.

    `grows`: the checkpoint's vocabulary may be smaller, because model.add_tokens adds rows.
    """
    saved = manifest["config"]["model"]
    ignored = {"init_std", "dropout", "attention_dropout", "from_hf", "add_tokens"}
    if grows and saved["vocab_size"] < model["vocab_size"]:
        ignored.add("vocab_size")
    for key, value in model.items():
        if key not in ignored and saved.get(key, value) != value:
            raise ValueError(
                f"{folder} holds another model: model.{key} is {one_line(str(saved[key]))} there and {value} here; "
                f"use the same model or another train.run_dir"
            )
