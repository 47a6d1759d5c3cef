"""Merge LoRA factors into the base weights: W + (alpha / r) B A."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.contents import config_of, is_adapter
from megalite.checkpoint.dtypes import to_torch
from megalite.checkpoint.folder import find, read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.config import Resolved
from megalite.config.dtypes import BY_TORCH
from megalite.config.shapes import Projection, projections
from megalite.config.trained import adapted
from megalite.exchange.base import base_of, is_hf
from megalite.exchange.hf_folder import open_folder
from megalite.exchange.hf_weights import read_whole, stored_dtype
from megalite.model.lora import join

Get = Callable[[str], Tensor]


def delta(linear: str, chosen: tuple[Projection, ...], config: Resolved, get: Get) -> Tensor:
    """(alpha / r) B A of the linear `linear`, [out, in], in at least fp32. `get(name)`: a whole factor."""
    m, t = config.model, config.tune
    parts = {}
    for p in chosen:
        a, b = (get(f"{linear}.lora_{p.name}.{factor}") for factor in "ab")
        wide = torch.promote_types(a.dtype, torch.float32)
        # join works on the last dimension, so rows become columns
        parts[p.name] = (b.to(wide) @ a.to(wide) * (t.lora_alpha / t.lora_rank)).t()
    rows = {p.name: p.rows for p in projections(m)[linear.split(".", 2)[2]]}
    return join(parts, rows, m.head_dim).t()


def merged(config: Resolved, get: Get) -> Get:
    """A function that returns the whole merged parameter of a name, in W's dtype. `get`: reads weights and factors."""
    linears = adapted(config.model, config.tune)

    def read(name: str) -> Tensor:
        weight, linear = get(name), name.removesuffix(".weight")
        if linear not in linears:
            return weight
        change = delta(linear, linears[linear], config, get)
        return (weight.to(torch.promote_types(weight.dtype, change.dtype)) + change).to(weight.dtype)

    return read


def read_base(base: Path) -> tuple[Get, Callable[[str], torch.dtype]]:
    """Two functions of a parameter's name: its whole value, and the dtype it is stored in."""
    if is_hf(base):
        folder = open_folder(base)
        return (lambda name: read_whole(folder, name)), (lambda name: stored_dtype(folder, name))
    manifest = read_manifest(base)
    return (
        lambda name: read_tensor(base, manifest, f"weight.{name}"),
        lambda name: to_torch(BY_TORCH[manifest["tensors"][f"weight.{name}"]["dtype"]]),
    )


def open_merged(adapter: Path, base: Path | None = None) -> tuple[Resolved, Get, Callable[[str], torch.dtype]]:
    """Open a LoRA run or checkpoint. Returns its configuration, and two functions as in `read_base`, of merged weights.

    `base`: the base's path now; None: the path recorded at training. Raises ValueError if that is missing or another
    model.
    """
    folder = find_adapter(adapter)
    manifest = read_manifest(folder)
    weight, dtype_of = read_base(base_of(folder, base))

    def get(name: str) -> Tensor:
        return read_tensor(folder, manifest, f"weight.{name}") if ".lora_" in name else weight(name)

    config = config_of(manifest)
    return config, merged(config, get), dtype_of


def find_adapter(path: Path) -> Path:
    """The LoRA checkpoint that `path`, a run or step folder, means. Raises ValueError if it is not one."""
    folder = find(path)
    if not is_adapter(read_manifest(folder)):
        raise ValueError(f"{folder} holds whole weights and no LoRA factors; name a run with tune.mode=lora")
    return folder
