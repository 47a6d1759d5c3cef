"""Saving and loading compared with torch.distributed.checkpoint (DCP): the same tensors, ranks and disk, in turn.

    python benchmarks/checkpoints.py [--rounds N] [--folder DIR]      writes results/checkpoints.md

Weights and both moments of about 100M parameters in fp32, matrices cut by rows over 2 and 4 ranks. Both sides sync
their files before a checkpoint counts as saved. Loads read what was just written, so from the page cache and not the
disk, and are compared bit for bit.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "dist"))

import torch
from ranks import Ranks

from megalite.checkpoint.state import State
from megalite.config import CheckpointConfig, Config, ModelConfig, TrainConfig, resolve_model
from megalite.config.shapes import shapes
from megalite.parallel.groups import World

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
MODEL = ModelConfig(vocab_size=10_000, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, ffn_hidden_size=2048)
SHAPES = shapes(resolve_model(MODEL, 256))
COUNTERS = dataclasses.asdict(State(step=1, consumed_samples=1))

Kinds = dict[str, dict[str, torch.Tensor]]
Contender = Callable[[], dict[str, float]]


def config(asynchronous: bool) -> Config:
    return Config(MODEL, train=TrainConfig(device="cpu"), checkpoint=CheckpointConfig(async_save=asynchronous, keep=0))


class Rank:
    """One rank's tensors and the contenders, each a method that returns seconds by name."""

    def __init__(self, world: World, folder: str) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        from megalite.parallel.cuts import even, uncut
        from megalite.parallel.mesh import Mesh

        rank, size = world.rank, world.size
        self.rank, self.size, self.folder = rank, size, Path(folder)
        self.mesh = Mesh(world, tp=size)
        self.shards = {n: even(s, 0, size, rank) if len(s) == 2 else uncut(s, rank) for n, s in SHAPES.items()}
        self.spans = {n: range(shard.numel) for n, shard in self.shards.items()}
        self.values, self.target = self._tensors(filled=True), self._tensors(filled=False)
        self.devices = init_device_mesh("cpu", (size,))
        self.dcp_group = dist.new_group(backend="gloo")  # DCP's thread and the step must not share a group
        self.work = torch.randn(384, 384)

    def _tensors(self, filled: bool) -> Kinds:
        kinds: Kinds = {}
        for k, kind in enumerate(KINDS):
            for i, (n, shard) in enumerate(self.shards.items()):
                # norms are the same on every rank
                seed = 1000 * k + i + (10_000 * (self.rank + 1) if len(shard.local_shape) == 2 else 0)
                generator = torch.Generator().manual_seed(seed)
                new = torch.randn(shard.local_shape, generator=generator) if filled else torch.zeros(shard.local_shape)
                kinds.setdefault(kind, {})[n] = new
        return kinds

    def _as_dtensors(self, kinds: Kinds) -> dict[str, Any]:
        from torch.distributed.tensor import DTensor, Replicate
        from torch.distributed.tensor import Shard as Rows

        where = {n: Rows(0) if len(s) == 2 else Replicate() for n, s in SHAPES.items()}
        whole: dict[str, Any] = {
            n: {"shape": torch.Size(s), "stride": (s[1], 1) if len(s) == 2 else (1,)} for n, s in SHAPES.items()
        }
        return {
            f"{kind}.{n}": DTensor.from_local(x, self.devices, [where[n]], run_check=False, **whole[n])
            for kind, named in kinds.items()
            for n, x in named.items()
        }

    def _fresh(self, name: str) -> Path:
        path = self.folder / name
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        self.mesh.world.barrier()
        return path

    def step(self, flag: float = 0.0) -> float:
        """A stand-in for a training step: arithmetic on one core and a small sum over the ranks."""
        for _ in range(12):
            torch.mm(self.work, self.work)
        return float(self.mesh.world.all_reduce(torch.tensor([flag], dtype=torch.float64)))

    def megalite_sync(self) -> dict[str, float]:
        from megalite.checkpoint.save import save

        run = self._fresh("megalite")
        began = time.perf_counter()
        save(run, config(False), self.mesh, self.shards, self.spans, self.values, COUNTERS)
        took = time.perf_counter() - began
        return {"held": took, "saved": took}

    def megalite_without_checksums(self) -> dict[str, float]:
        from megalite.checkpoint import blocks

        none = SimpleNamespace(sha256=lambda _: SimpleNamespace(hexdigest=lambda: ""))
        with mock.patch.object(blocks, "hashlib", none):
            return self.megalite_sync()

    def megalite_async(self) -> dict[str, float]:
        from megalite.checkpoint.save import Saver

        saver = Saver(self._fresh("megalite"), config(True), self.mesh)
        began = time.perf_counter()
        saver.start(self.shards, self.spans, self.values, COUNTERS)
        held, steps, final = time.perf_counter() - began, 0, None
        while final is None:
            over, failed = saver.progress()
            self.step()
            sums = self.mesh.world.all_reduce(torch.tensor([over, failed], dtype=torch.float64)).tolist()
            final, steps = saver.settle(*sums), steps + 1
        saved = time.perf_counter() - began
        return {"held": held, "saved": saved, "steps": steps, "step": (saved - held) / steps}

    def dcp_sync(self) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp

        path = self._fresh("dcp")
        began = time.perf_counter()
        dcp.save(self._as_dtensors(self.values), checkpoint_id=str(path))
        took = time.perf_counter() - began
        return {"held": took, "saved": took}

    def dcp_async(self) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp

        path = self._fresh("dcp")
        began = time.perf_counter()
        tensors = self._as_dtensors(self.values)
        future: Any = dcp.async_save(tensors, checkpoint_id=str(path), process_group=self.dcp_group)
        held, steps, over = time.perf_counter() - began, 0, False
        while not over:
            over, steps = self.step(float(future.done())) == self.size, steps + 1
        future.result()
        saved = time.perf_counter() - began
        return {"held": held, "saved": saved, "steps": steps, "step": (saved - held) / steps}

    def megalite_load(self, verify: bool) -> dict[str, float]:
        from megalite.checkpoint.folder import read_manifest
        from megalite.checkpoint.load import load

        began = time.perf_counter()
        checkpoint = self.folder / "megalite" / "checkpoints" / "step-00000001"
        load(checkpoint, read_manifest(checkpoint), self.shards, self.target, self.spans, verify)
        self.mesh.world.barrier()
        return {"loaded": time.perf_counter() - began}

    def dcp_load(self) -> dict[str, float]:
        import torch.distributed.checkpoint as dcp

        began = time.perf_counter()
        dcp.load(self._as_dtensors(self.target), checkpoint_id=str(self.folder / "dcp"))
        self.mesh.world.barrier()
        return {"loaded": time.perf_counter() - began}

    def checked(self, load: Contender) -> dict[str, float]:
        """Run `load` and check that every element is the one that was saved."""
        for named in self.target.values():
            for x in named.values():
                x.zero_()
        found = load()
        assert all(self.target[k][n].equal(self.values[k][n]) for k in KINDS for n in SHAPES)
        return found

    def contenders(self) -> dict[str, Contender]:
        return {
            "megalite, no checksums": self.megalite_without_checksums,
            "megalite": self.megalite_sync,
            "DCP": self.dcp_sync,
            "load megalite": lambda: self.checked(lambda: self.megalite_load(True)),
            "load megalite, not verified": lambda: self.checked(lambda: self.megalite_load(False)),
            "load DCP": lambda: self.checked(self.dcp_load),
            "megalite async": self.megalite_async,
            "DCP async": self.dcp_async,
        }


def measure(folder: str, rounds: int) -> int:
    """One rank's process: run every contender in turn, `rounds` times after a first round that is not counted."""
    from megalite.run.world import start_world

    with start_world(config(False)) as world:
        rank = Rank(world, folder)
        contenders = rank.contenders()
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        alone: list[float] = []
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                os.sync()
                rank.mesh.world.barrier()
                found = contender()
                if number:
                    rows[name].append(found)
            began = time.perf_counter()
            for _ in range(10):
                rank.step()
            alone.append((time.perf_counter() - began) / 10)
        if rank.rank == 0:
            Path(folder, "rows.json").write_text(json.dumps({"rows": rows, "alone": alone[1:]}))
    return 0


def cell(values: list[float], unit: float = 1.0, digits: int = 2) -> str:
    low, middle, high = (f(values) * unit for f in (min, statistics.median, max))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def tables(size: int, found: dict[str, Any]) -> list[str]:
    rows = found["rows"]
    lines = [f"\n## {size} ranks\n", f"A step alone takes {cell(found['alone'], 1e3, 0)} ms.\n"]
    lines += ["| save | training held, s | until saved, s | steps meanwhile | a step meanwhile, ms |"]
    lines += ["|---|---|---|---|---|"]
    for name in ("megalite", "megalite, no checksums", "DCP", "megalite async", "DCP async"):
        runs = rows[name]
        text = f"| {name} | {cell([r['held'] for r in runs])} | {cell([r['saved'] for r in runs])} |"
        if "steps" in runs[0]:
            steps = cell([r["steps"] for r in runs], digits=0)
            text += f" {steps} | {cell([r['step'] for r in runs], 1e3, 0)} |"
        else:
            text += " | |"
        lines.append(text)
    lines += ["\n| load | s |", "|---|---|"]
    for name in ("load megalite", "load megalite, not verified", "load DCP"):
        lines.append(f"| {name.removeprefix('load ')} | {cell([r['loaded'] for r in rows[name]])} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5; fewer print, but write nothing)")
    parser.add_argument("--folder", help="folder for the checkpoints (default: the system's temporary folder)")
    options = parser.parse_args()
    count = sum(s[0] * (s[1] if len(s) == 2 else 1) for s in SHAPES.values())
    gigabytes = count * 4 * len(KINDS) / 1e9
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"
    lines = [
        "# Checkpoints beside torch.distributed.checkpoint\n",
        f"`python benchmarks/checkpoints.py`: {count / 1e6:.0f}M parameters and moments, fp32, {gigabytes:.2f} GB.",
        f"Median (fastest-slowest) of {options.rounds} rounds.",
        f"{machine}, torch {torch.__version__}; load average {os.getloadavg()[0]:.1f} before the run.",
    ]
    for size in (2, 4):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            with Ranks(size, measure, folder, options.rounds) as ranks:
                ended = ranks.wait(timeout_s=1800)
            assert set(ended.codes) == {0}, ended
            new = tables(size, json.loads(Path(folder, "rows.json").read_text()))
        print("\n".join(new), flush=True)
        lines += new
    if options.rounds >= 5:
        (RESULTS / "checkpoints.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
