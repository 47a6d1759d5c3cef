"""The weights that LoRA's factors belong to: where they lie, and a fingerprint by which others are refused.

No torch: that a base is gone or another is told first.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megalite.checkpoint.contents import is_adapter
from megalite.checkpoint.folder import find, read_manifest
from megalite.config import Config
from megalite.exchange.hf_folder import weight_files

# of each end of a file of Hugging Face's, which has no checksums: its header and some of its values
_SAMPLE = 2**20


def is_hf(folder: Path) -> bool:
    """Whether it is a Hugging Face folder and not a run or one of its checkpoints."""
    return (folder / "config.json").is_file() and not (folder / "manifest.json").is_file()


def fingerprint(folder: Path) -> str:
    """What tells weights from others: of a checkpoint its digest, in which every block has its checksum.

    Of a Hugging Face folder a hash of config.json and of size, first and last MiB of each file.
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
    """Fingerprint and place, as an adapter's manifest keeps them."""
    return f"{fingerprint(base)} {base.resolve()}"


def find_base(config: Config, source: Path | None) -> Path:
    """The weights under a run of LoRA that starts from `source`, or goes on from it if that is an adapter.

    They are model.from_hf or checkpoint.load, or where that is an adapter the base that this one names. ValueError
    where an adapter to go on from was trained on another.
    """
    named = Path(config.model.from_hf) if config.model.from_hf else find(config.checkpoint.load or "")
    base = named if is_hf(named) or not is_adapter(read_manifest(named)) else base_of(named)
    if source is not None and is_adapter(manifest := read_manifest(source)):
        known, here = manifest["base"].partition(" "), fingerprint(base)
        if known[0] != here:
            raise ValueError(
                f"{source} holds adapters to the weights {known[0]} of {known[2]}, and {base} is {here}; "
                f"set checkpoint.load or model.from_hf to those that they were trained on"
            )
    return base


def base_of(adapter: Path, base: Path | None = None) -> Path:
    """The weights that an adapter's checkpoint belongs to: `base`, or what lies where they lay when it was trained.

    ValueError where they are gone or others.
    """
    known, _, place = read_manifest(adapter)["base"].partition(" ")
    path = base or Path(place)
    try:
        found = path if is_hf(path) else find(path)
    except ValueError as error:
        raise ValueError(f"{adapter} holds adapters, and their base is not there: {error}") from None
    if fingerprint(found) != known:
        raise ValueError(f"{adapter} holds adapters to the weights {known}, and {found} is {fingerprint(found)}")
    return found
