"""The weights that LoRA's factors belong to: where they lie, and a fingerprint by which others are refused."""

from __future__ import annotations

from pathlib import Path

from megalite.checkpoint.folder import find, read_manifest
from megalite.config import Config
from megalite.config.tune import is_adapter


def fingerprint(folder: Path) -> str:
    """What tells a checkpoint from others: the digest of its manifest, in which every block has its checksum."""
    digest: str = read_manifest(folder)["digest"]
    return digest[:16]


def find_base(config: Config, source: Path) -> Path:
    """The checkpoint of whole weights under a run of LoRA that starts or goes on from `source`.

    It is checkpoint.load, or where that is an adapter the base that this one names. ValueError where an adapter to go
    on from was trained on another.
    """
    assert config.checkpoint.load is not None, "the checks ask for it"
    named = find(config.checkpoint.load)
    manifest = read_manifest(named)
    base = base_of(named) if is_adapter(manifest) else named
    manifest = read_manifest(source)
    if is_adapter(manifest) and manifest["base"].split()[0] != fingerprint(base):
        raise ValueError(
            f"{source} holds adapters to {manifest['base']}, and {base} is {fingerprint(base)}; "
            f"set checkpoint.load to the weights that they were trained on"
        )
    return base


def base_of(adapter: Path, base: Path | None = None) -> Path:
    """The checkpoint that an adapter belongs to: `base`, or where it lay when it was trained.

    ValueError where it is not there any more or not the same.
    """
    known, _, path = read_manifest(adapter)["base"].partition(" ")
    try:
        found = find(base or path)
    except ValueError as error:
        raise ValueError(f"{adapter} holds adapters, and their base is gone: {error}") from None
    if fingerprint(found) != known:
        raise ValueError(f"{adapter} holds adapters to weights {known}, and {found} is {fingerprint(found)}")
    return found
