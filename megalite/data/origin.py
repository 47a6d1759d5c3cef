"""Which tokenizer data was made with, as its sidecar says, so that a run, its samples and its export find it again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.data.indexed import paths
from megalite.text.rows import read_object
from megalite.text.tokenizer import Tokenizer, load_tokenizer


def describe_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """What the sidecar of data in `folder` says of its tokenizer.

    The path is relative where the file lies beside or below the data, so that the folder may move.
    """
    full, base = Path(os.path.abspath(tokenizer.path)), Path(os.path.abspath(folder))
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": str(full.relative_to(base) if full.is_relative_to(base) else full),
        "tokenizer_sha256": tokenizer.fingerprint,
    }


def recorded_tokenizer(prefix: str | Path) -> str | None:
    """The path in the sidecar of a prefix; None where there is none."""
    name = _sidecar(prefix).get("tokenizer")
    return name if isinstance(name, str) else None


def made_with(prefix: str | Path, tokenizer: Tokenizer) -> bool:
    """Whether a prefix was made with this tokenizer, or does not say."""
    return _sidecar(prefix).get("tokenizer_sha256", tokenizer.fingerprint) == tokenizer.fingerprint


def find_tokenizer_of(prefix: str | Path, *folders: Path) -> Path | None:
    """The tokenizer that a prefix was made with: where it was, beside the data, or in one of `folders`.

    None where none of these files has the fingerprint in the sidecar.
    """
    folder, name, wanted = Path(prefix).parent, recorded_tokenizer(prefix), _sidecar(prefix).get("tokenizer_sha256")
    if name is None:
        return None
    beside = [place / f"tokenizer{Path(name).suffix}" for place in folders]
    for file in (folder / name, folder / Path(name).name, *beside):
        if file.is_file() and load_tokenizer(file).fingerprint == wanted:
            return file
    return None


def tokenizer_of_run(data: Mapping[str, Any], run_dir: Path) -> Path | None:
    """The tokenizer of a run that kept none in its folder, by the data section of its configuration."""
    named = data.get("tokenizer")
    if isinstance(named, str) and Path(named).is_file():
        return Path(named)
    prefix = data.get("path") or data.get("sft")
    return find_tokenizer_of(prefix, run_dir) if isinstance(prefix, str) else None


def _sidecar(prefix: str | Path) -> dict[str, Any]:
    path = paths(prefix)[2]
    return read_object(path) if path.is_file() else {}
