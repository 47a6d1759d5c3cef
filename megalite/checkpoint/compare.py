"""Compare two checkpoints tensor by tensor, whatever topologies they were saved at."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.load import read_tensor

# elements compared at a time, in float64
CHUNK = 2**20


@dataclass(frozen=True)
class Difference:
    """How tensor `name` differs between two checkpoints, a and b.

    `why`: why the elements cannot be compared, or that the dtypes differ. `elements` of `count` are unequal; `largest`
    is max|a - b|, `relative` is max|a - b| / max|b|.
    """

    name: str
    why: str = ""
    elements: int = 0
    count: int = 0
    largest: float = 0.0
    relative: float = 0.0

    def __str__(self) -> str:
        text = [self.why] if self.why else []
        if self.elements:
            share = f"{self.elements:,} of {self.count:,} elements"
            text.append(f"max|a-b| {self.largest:.3e}, relative {self.relative:.3e}, {share}")
        return f"{self.name}: {'; '.join(text)}"


def compare(
    a: tuple[Path, dict[str, Any]], b: tuple[Path, dict[str, Any]], kinds: Collection[str] = ()
) -> Iterator[tuple[str, Difference | None]]:
    """Yield (name, difference or None) for each tensor of checkpoints `a` and `b`, each a (folder, manifest).

    `kinds`: only these (weight, exp_avg, ...); empty: all. Tensors are equal if all bits are. Raises Damaged as in
    `read_tensor`. Memory: one tensor of each checkpoint.
    """
    names = dict.fromkeys((*a[1]["tensors"], *b[1]["tensors"]))
    for name in names:
        if not kinds or name.partition(".")[0] in kinds:
            yield name, _difference(name, a, b)


def _difference(name: str, a: tuple[Path, dict[str, Any]], b: tuple[Path, dict[str, Any]]) -> Difference | None:
    entries = [manifest["tensors"].get(name) for _, manifest in (a, b)]
    if None in entries:
        return Difference(name, f"only in {'a' if entries[1] is None else 'b'}")
    shapes, dtypes = [entry["shape"] for entry in entries], [entry["dtype"] for entry in entries]
    if shapes[0] != shapes[1]:
        return Difference(name, f"shape {shapes[0]} in a, {shapes[1]} in b")
    x, y = read_tensor(*a, name), read_tensor(*b, name)
    if dtypes[0] == dtypes[1]:
        return None if _bits(x).equal(_bits(y)) else _measured(name, "", x, y)
    return _measured(name, f"{dtypes[0]} in a, {dtypes[1]} in b", x, y)


def _measured(name: str, why: str, x: Tensor, y: Tensor) -> Difference:
    elements, largest, scale = 0, 0.0, 0.0
    for p, q in zip(x.flatten().split(CHUNK), y.flatten().split(CHUNK)):
        bits = _bits(p).view(len(p), -1).ne(_bits(q).view(len(q), -1)).any(1) if x.dtype == y.dtype else None
        p, q = p.double(), q.double()
        same = p.eq(q) | (p.isnan() & q.isnan())  # equal infinities, and NaN beside NaN, differ by 0
        elements += int((bits if bits is not None else ~same).sum())
        # NaN beside a number makes the maximum NaN
        largest = float(torch.tensor(largest).double().maximum((p - q).abs().masked_fill(same, 0.0).max()))
        scale = max(scale, float(q.abs().nan_to_num(0.0).max()))
    return Difference(name, why, elements, x.numel(), largest, largest / scale if scale else float(largest and "inf"))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def differing_values(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value in a, value in b) where two nested mappings differ; None for a missing key."""
    for key in dict.fromkeys((*a, *b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            yield from differing_values(x, y, f"{prefix}{key}.")
        elif x != y and not (x != x and y != y):
            yield f"{prefix}{key}", x, y
