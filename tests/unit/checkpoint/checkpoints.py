"""Small checkpoints, of one process and of two ranks, and tools/checkpoint.py run on them."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import BUILDING, step_folder
from megalite.checkpoint.publish import publish, write_rank
from megalite.checkpoint.save import own_parts, write_whole
from megalite.config import Config
from megalite.parallel.cuts import even
from tools.checkpoint import main

TENSORS = {
    "weight.embed.weight": torch.arange(600, dtype=torch.float32).view(20, 30),
    "weight.wide": torch.arange(100, dtype=torch.float64).view(2, 50),
    "weight.norm.weight": torch.arange(7).bfloat16(),
    "exp_avg.norm.weight": torch.tensor([math.nan, math.inf, -0.0, 1e-40]),
    "weight.half": torch.arange(9).half().view(3, 3),
}


STATE = {"step": 3, "consumed_samples": 24, "best_loss": math.nan}


def write_tensors(folder: Path, tensors: dict[str, Tensor] = TENSORS) -> Path:
    described = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    return write_whole(folder, Config(), described, tensors.__getitem__, STATE)


def bits(x: Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def tensors(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"{kind}.{n}": torch.randn(16, 4, generator=generator) for kind in ("weight", "exp_avg") for n in "ab"}


def step_state(step: int) -> dict[str, Any]:
    return {"step": step, "consumed_samples": 8 * step, "data": "corpus: 9 tokens"}


def write(run: Path, step: int, values: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint of one process."""
    values = values or tensors()
    described = {name: (x.dtype, tuple(x.shape)) for name, x in values.items()}
    return write_whole(step_folder(run, step), Config(), described, values.__getitem__, step_state(step))


def write_two(run: Path, step: int) -> Path:
    """The same of two ranks, each with half of the rows."""
    final, values = step_folder(run, step), tensors()
    building = final.with_name(BUILDING + final.name)
    for rank in range(2):
        shards = {n: even((16, 4), 0, 2, rank) for n in "ab"}
        kinds = {kind: {n: shards[n].cut(values[f"{kind}.{n}"]) for n in "ab"} for kind in ("weight", "exp_avg")}
        owned = list(own_parts(shards, {n: range(32) for n in "ab"}, kinds))
        write_rank(building, rank, [p for p, _ in owned], (v for _, v in owned), Faults(rank, ""))
    publish(building, final, Config(), step_state(step), Faults(0, ""))
    return final


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def tool(*words: object, status: int = 0) -> str:
    """What the command prints, errors too; fails unless it ends with `status`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main([str(word) for word in words])
    assert found == status, out.getvalue() + err.getvalue()
    assert (status == 2) == err.getvalue().startswith("error: ")
    assert err.getvalue().count("\n") == (status == 2)
    return out.getvalue() + err.getvalue()


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
