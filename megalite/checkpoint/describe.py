"""A checkpoint's manifest summarised, as values and as lines to print. No torch here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megalite.config.dtypes import BY_TORCH

# keys of a manifest that are not counters
_PARTS = {"digest", "format", "versions", "config", "files", "tensors"}


def state_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The counters of a manifest as a dict: step, consumed_samples, loss_scale, ..."""
    return {key: value for key, value in manifest.items() if key not in _PARTS}


def tensor_bytes(entry: dict[str, Any]) -> int:
    """Bytes of one tensor, by its entry in a manifest."""
    return BY_TORCH[entry["dtype"]].bytes * math.prod(entry["shape"])


def describe(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as plain values (JSON): path, state, config, tensors by kind, files and bytes, versions."""
    kinds: dict[str, dict[str, Any]] = {}
    for full, entry in manifest["tensors"].items():
        new = {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []}
        kind = kinds.setdefault(full.partition(".")[0], new)
        kind["tensors"] += 1
        kind["elements"] += math.prod(entry["shape"])
        kind["bytes"] += tensor_bytes(entry)
        if entry["dtype"] not in kind["dtypes"]:
            kind["dtypes"].append(entry["dtype"])
    return {
        "path": str(folder),
        "format": manifest["format"],
        "state": state_of(manifest),
        "kinds": kinds,
        "blocks": sum(len(entry["blocks"]) for entry in manifest["tensors"].values()),
        "files": manifest["files"],
        "bytes": sum(manifest["files"].values()),
        "versions": manifest.get("versions", {}),
        "config": manifest["config"],
    }


def describe_lines(what: dict[str, Any]) -> list[str]:
    """What `describe` returns, as lines to print."""
    state, config = dict(what["state"]), what["config"]
    model, parallel = config.get("model", {}), config.get("parallel", {})
    lines = [what["path"]]

    def row(name: str, text: str) -> None:
        lines.append(f"  {name:<10} {text}")

    row("step", f"{state.pop('step'):,}, {state.pop('consumed_samples'):,} samples consumed")
    weights = what["kinds"].get("weight", {}).get("elements", 0)
    row("model", f"{model_line(model)}; {weights:,} parameters stored")
    sizes = [f"{axis} {parallel[axis]}" for axis in ("tp", "pp", "dp") if parallel.get(axis) is not None]
    row("topology", " x ".join(sizes) + (", ZeRO-1" if parallel.get("zero") else "") + " when saved; loads at any")
    row("data", state.pop("data", "") or "not recorded")
    if base := state.pop("base", ""):
        row("base", base)
    for kind, counted in what["kinds"].items():
        amount = f"{many(counted['tensors'], 'tensor')}, {counted['elements']:,} elements"
        row(kind, f"{amount}, {size(counted['bytes'])}, {', '.join(counted['dtypes'])}")
    row("files", f"{len(what['files'])}, {many(what['blocks'], 'block')}, {size(what['bytes'])}")
    row("versions", ", ".join(f"{name} {version}" for name, version in what["versions"].items()))
    row("state", ", ".join(f"{name} {value}" for name, value in state.items()) or "no more than that")
    return lines


def model_line(model: dict[str, Any]) -> str:
    """The model section of a configuration, in one line."""
    get = model.get
    heads = f"{get('num_heads')} heads over {get('num_kv_heads')} kv heads"
    sizes = f"{get('num_layers')} layers, hidden {get('hidden_size')}, {heads}, ffn {get('ffn_hidden_size')}"
    return f"{sizes}, vocabulary {get('vocab_size')}{', tied' if get('tie_embeddings') else ''}"


def size(count: int) -> str:
    """Bytes in a readable decimal unit: 1.62 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def many(count: int, noun: str) -> str:
    """A count with its noun in singular or plural: 1 file, 2,000 files."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
