"""LoRA's factors put into the weights they stand beside: W + (alpha / r) B A."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.folder import find, read_manifest, step_folder
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.save import write_whole
from megalite.config import Config, ConfigError, TuneConfig, to_yaml
from megalite.config.schema import SECTIONS
from megalite.config.tune import Projection, adapted, is_adapter, projections
from megalite.model.names import global_names
from megalite.tune.base import base_of
from megalite.tune.lora import join

Get = Callable[[str], Tensor]
# of a manifest, what is not a run's state
NO_STATE = ("format", "versions", "config", "tensors", "files", "digest")


def delta(linear: str, chosen: tuple[Projection, ...], config: Config, get: Get) -> Tensor:
    """(alpha / r) B A of the linear `linear`, [out, in] in the order of its rows, in at least fp32.

    `get(name)`: a whole factor.
    """
    m, t = config.model, config.tune
    assert m.head_dim is not None
    parts = {}
    for p in chosen:
        a, b = (get(f"{linear}.lora_{p.name}.{factor}") for factor in "ab")
        wide = torch.promote_types(a.dtype, torch.float32)
        # what a row is here, join has as the last dimension
        parts[p.name] = (b.to(wide) @ a.to(wide) * (t.lora_alpha / t.lora_rank)).t()
    rows = {p.name: p.rows for p in projections(m)[linear.split(".", 2)[2]]}
    return join(parts, rows, m.head_dim).t()


def merged(config: Config, get: Get) -> Get:
    """A function of whole parameters' names: W + (alpha / r) B A, in W's dtype. `get` gives weights and factors."""
    linears = adapted(config)

    def found(name: str) -> Tensor:
        weight, linear = get(name), name.removesuffix(".weight")
        if linear not in linears:
            return weight
        change = delta(linear, linears[linear], config, get)
        return (weight.to(torch.promote_types(weight.dtype, change.dtype)) + change).to(weight.dtype)

    return found


def open_merged(adapter: Path, base: Path | None = None) -> tuple[Config, Get]:
    """The configuration of a LoRA checkpoint or run, and its merged weights by name, one read at a time.

    `base`: where its base lies now, if not where it lay. ValueError where that is gone or another.
    """
    folder = find_adapter(adapter)
    manifest = read_manifest(folder)
    config, under = config_of(manifest), base_of(folder, base)
    weights = read_manifest(under)

    def get(name: str) -> Tensor:
        where, listed = (folder, manifest) if ".lora_" in name else (under, weights)
        return read_tensor(where, listed, f"weight.{name}")

    return config, merged(config, get)


def merge_adapter(adapter: Path, target: Path, base: Path | None = None) -> Path:
    """Write the new run folder `target` with one checkpoint of merged weights; gives the checkpoint.

    Of a run of LoRA its configuration and tokenizer go along. One parameter is in memory at a time.
    """
    folder = find_adapter(adapter)
    require_new(target)
    config, get = open_merged(folder, base)
    manifest = read_manifest(folder)
    stored = read_manifest(base_of(folder, base))["tensors"]
    whole = dataclasses.replace(config, tune=TuneConfig(), checkpoint=dataclasses.replace(config.checkpoint, load=None))
    full = {f"weight.{name}": stored[f"weight.{name}"] for name in global_names(config.model)}
    state = {key: value for key, value in manifest.items() if key not in NO_STATE} | {"base": ""}
    final = step_folder(target, manifest["step"])
    final.parent.mkdir(parents=True)
    write_whole(
        final,
        whole,
        {name: (getattr(torch, entry["dtype"]), tuple(entry["shape"])) for name, entry in full.items()},
        lambda name: get(name.removeprefix("weight.")),
        state,
    )
    (target / "config.yaml").write_text(to_yaml(whole), encoding="utf-8")
    for tokenizer in folder.parent.parent.glob("tokenizer.*"):
        shutil.copyfile(tokenizer, target / tokenizer.name)
    return final


def config_of(manifest: dict[str, Any]) -> Config:
    """The configuration that a checkpoint was written with."""
    sections = {name: dict(values) for name, values in manifest["config"].items()}
    stages = sections["parallel"]["stages"]
    sections["parallel"]["stages"] = None if stages is None else tuple(stages)
    return Config(**{name: SECTIONS[name](**values) for name, values in sections.items()})


def find_adapter(path: Path) -> Path:
    """The LoRA checkpoint meant by `path`, a run or a step folder; ValueError if it is none."""
    folder = find(path)
    if not is_adapter(read_manifest(folder)):
        raise ValueError(f"{folder} holds whole weights and no LoRA factors; there is nothing to merge or to export")
    return folder


def require_new(target: Path) -> None:
    """ConfigError unless `target` is free to be written."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not an empty folder; name a new one")
