"""The base weights that LoRA factors belong to: their path, and a fingerprint to refuse others. No torch here."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megalite.checkpoint.contents import is_adapter
from megalite.checkpoint.folder import find, read_manifest
from megalite.config import Config
from megalite.exchange.hf_folder import weight_files

# bytes hashed at each end of a Hugging Face file, which has no checksums: its header and some values
_SAMPLE = 2**20


def is_hf(folder: Path) -> bool:
    """Whether a folder is a Hugging Face folder, not a run folder or a checkpoint."""
    return (folder / "config.json").is_file() and not (folder / "manifest.json").is_file()


def fingerprint(folder: Path) -> str:
    """16 hex digits that identify weights.

    Of a checkpoint: from its manifest's digest, which covers the checksum of every block. Of a Hugging Face folder: a
    SHA-256 of config.json and of name, size, first and last MiB of each weight file.
    """
    if not is_hf(folder):
        digest: str = read_manifest(folder)["digest"]
        return digest[:16]
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(weight_files(folder)):
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            found.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            found.update(file.read())
    return found.hexdigest()[:16]


def name_of(base: Path) -> str:
    """Fingerprint and absolute path of a base, as an adapter's manifest stores them."""
    return f"{fingerprint(base)} {base.resolve()}"


def find_base(config: Config, source: Path | None) -> Path:
    """The base weights of a LoRA run: model.from_hf or checkpoint.load, or, if that is an adapter, the adapter's base.

    `source`: the checkpoint that the run starts from or resumes. Raises ValueError if it is an adapter that was trained
    on other weights.
    """
    named = Path(config.model.from_hf) if config.model.from_hf else find(config.checkpoint.load or "")
    base = named if is_hf(named) or not is_adapter(read_manifest(named)) else base_of(named)
    if source is not None and is_adapter(manifest := read_manifest(source)):
        known, here = manifest["base"].partition(" "), fingerprint(base)
        if known[0] != here:
            raise ValueError(
                f"{source} holds adapters for the weights {known[0]} of {known[2]}, but {base} is {here}; "
                f"set checkpoint.load or model.from_hf to the weights they were trained on"
            )
    return base


def base_of(adapter: Path, base: Path | None = None) -> Path:
    """The base weights of an adapter's checkpoint: `base`, or those at the path recorded when it was trained.

    Raises ValueError if they are missing or have another fingerprint.
    """
    known, _, place = read_manifest(adapter)["base"].partition(" ")
    path = base or Path(place)
    try:
        found = path if is_hf(path) else find(path)
    except ValueError as error:
        raise ValueError(f"{adapter} holds adapters whose base is missing: {error}") from None
    if fingerprint(found) != known:
        raise ValueError(f"{adapter} holds adapters for the weights {known}, but {found} is {fingerprint(found)}")
    return found
