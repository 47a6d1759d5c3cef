"""Records in the sidecar which tokenizer made the data, and finds it again for runs, samples and exports."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalite.config import DataConfig
from megalite.data.indexed import paths
from megalite.text.rows import read_object
from megalite.text.tokenizer import Tokenizer, load_tokenizer


def describe_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Return the sidecar entries on the tokenizer of data in `folder`.

    The path is relative if the tokenizer is in or below `folder`, so that the folder can be moved.
    """
    full, base = Path(os.path.abspath(tokenizer.path)), Path(os.path.abspath(folder))
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": str(full.relative_to(base) if full.is_relative_to(base) else full),
        "tokenizer_sha256": tokenizer.fingerprint,
    }


def recorded_tokenizer(prefix: str | Path) -> str | None:
    """Return the tokenizer path in the sidecar of a prefix, or None if there is none."""
    name = _sidecar(prefix).get("tokenizer")
    return name if isinstance(name, str) else None


def made_with(prefix: str | Path, tokenizer: Tokenizer) -> bool:
    """Whether a prefix was made with this tokenizer; True if its sidecar names none."""
    return _sidecar(prefix).get("tokenizer_sha256", tokenizer.fingerprint) == tokenizer.fingerprint


def find_tokenizer_of(prefix: str | Path, *folders: Path) -> Path | None:
    """Find the tokenizer that a prefix was made with: at its recorded path, next to the data, or in `folders`.

    Returns None if none of these files has the fingerprint in the sidecar.
    """
    folder, name, wanted = Path(prefix).parent, recorded_tokenizer(prefix), _sidecar(prefix).get("tokenizer_sha256")
    if name is None:
        return None
    others = [other / f"tokenizer{Path(name).suffix}" for other in folders]
    for file in (folder / name, folder / Path(name).name, *others):
        if file.is_file() and load_tokenizer(file).fingerprint == wanted:
            return file
    return None


def tokenizer_of_run(data: Mapping[str, Any], run_dir: Path) -> Path | None:
    """Find the tokenizer of a run without one in its folder, from the data section of its configuration, or None."""
    named = data.get("tokenizer")
    if isinstance(named, str) and Path(named).is_file():
        return Path(named)
    prefix = data.get("path") or data.get("sft")
    return find_tokenizer_of(prefix, run_dir) if isinstance(prefix, str) else None


def _sidecar(prefix: str | Path) -> dict[str, Any]:
    path = paths(prefix)[2]
    return read_object(path) if path.is_file() else {}


def with_its_tokenizer(data: DataConfig, run_dir: Path, say: Callable[[str], None]) -> DataConfig:
    """`data` with the tokenizer that an indexed training set was made with, if no other is named.

    Says where it was found, or that generation and export will lack it. `run_dir` may hold a copy.
    """
    prefix = data.sft or data.path
    if prefix is None or not paths(prefix)[1].is_file():
        return data
    needed = "generate, evaluate and export need it: set data.tokenizer"
    if data.tokenizer is not None:
        if not made_with(prefix, load_tokenizer(data.tokenizer)):
            say(
                f"note: {prefix} was made with another tokenizer than data.tokenizer={data.tokenizer}: "
                f"{recorded_tokenizer(prefix)}"
            )
    elif found := find_tokenizer_of(prefix, run_dir):
        say(f"data.tokenizer={found}: {prefix} was made with it")
        return dataclasses.replace(data, tokenizer=str(found))
    elif name := recorded_tokenizer(prefix):
        say(f"note: the tokenizer that made {prefix} is missing or has changed: {name}; {needed}")
    else:
        say(f"note: {prefix} does not name the tokenizer that made it; {needed}")
    return data
