"""Saving and loading beside torch.distributed.checkpoint (DCP): the same tensors, ranks and disk, in turn.

    python benchmarks/checkpoints.py [--rounds N] [--folder DIR]      writes results/checkpoints.md

Weights and both moments of about 100M parameters in fp32, matrices cut by rows over 2 and 4 ranks. Both sides sync
their files before a checkpoint counts as saved; what is loaded was just written, so it comes from memory, not the disk,
and is compared bit for bit.
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

from ranks import Ranks

from megalite.checkpoint.state import State
from megalite.config import ModelConfig
from megalite.config.shapes import shapes

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
MODEL = ModelConfig(vocab_size=10_000, hidden_size=768, num_layers=12, num_heads=12, head_dim=64, ffn_hidden_size=2048)
SHAPES = shapes(MODEL)
COUNTERS = dataclasses.asdict(State(step=1, consumed_samples=1))


def measure(folder: str, rounds: int) -> int:
    """One rank: every contender in turn, `rounds` times after a first one that is not counted."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Rows

    from megalite.checkpoint import blocks
    from megalite.checkpoint.folder import read_manifest
    from megalite.checkpoint.load import load
    from megalite.checkpoint.save import Saver, save
    from megalite.config import CheckpointConfig, Config, TrainConfig
    from megalite.parallel.cuts import even, uncut
    from megalite.parallel.mesh import Mesh
    from megalite.run.world import start_world

    def config(asynchronous: bool) -> Config:
        return Config(
            MODEL, train=TrainConfig(device="cpu"), checkpoint=CheckpointConfig(async_save=asynchronous, keep=0)
        )

    with start_world(config(False)) as world:
        rank, size = world.rank, world.size
        mesh = Mesh(world, tp=size)
        shards = {n: even(s, 0, size, rank) if len(s) == 2 else uncut(s, rank) for n, s in SHAPES.items()}
        spans = {n: range(shard.numel) for n, shard in shards.items()}

        def tensors(filled: bool) -> dict[str, dict[str, torch.Tensor]]:
            # a norm is the same on every rank
            kinds: dict[str, dict[str, torch.Tensor]] = {}
            for k, kind in enumerate(KINDS):
                for i, (n, shard) in enumerate(shards.items()):
                    seed = 1000 * k + i + (10_000 * (rank + 1) if len(shard.local_shape) == 2 else 0)
                    generator = torch.Generator().manual_seed(seed)
                    new = torch.randn(shard.local_shape, generator=generator) if filled else None
                    kinds.setdefault(kind, {})[n] = torch.zeros(shard.local_shape) if new is None else new
            return kinds

        values, target = tensors(filled=True), tensors(filled=False)
        devices = init_device_mesh("cpu", (size,))

        def as_dtensors(kinds: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
            where = {n: Rows(0) if len(s) == 2 else Replicate() for n, s in SHAPES.items()}
            return {
                f"{kind}.{n}": DTensor.from_local(
                    x, devices, [where[n]], run_check=False, shape=torch.Size(SHAPES[n]), stride=_strides(SHAPES[n])
                )
                for kind, named in kinds.items()
                for n, x in named.items()
            }

        beside = dist.new_group(backend="gloo")  # DCP's thread and the step must not share one
        work = torch.randn(384, 384)

        def step(flag: float) -> float:
            """What a training step does here: arithmetic of one core, and one small sum over the ranks."""
            for _ in range(12):
                torch.mm(work, work)
            return float(mesh.world.all_reduce(torch.tensor([flag], dtype=torch.float64)))

        def fresh(name: str) -> Path:
            path = Path(folder, name)
            if rank == 0:
                shutil.rmtree(path, ignore_errors=True)
            mesh.world.barrier()
            return path

        def megalite_sync() -> dict[str, float]:
            run = fresh("megalite")
            began = time.perf_counter()
            save(run, config(False), mesh, shards, spans, values, COUNTERS)
            took = time.perf_counter() - began
            return {"held": took, "saved": took}

        def megalite_without_checksums() -> dict[str, float]:
            none = SimpleNamespace(sha256=lambda _: SimpleNamespace(hexdigest=lambda: ""))
            with mock.patch.object(blocks, "hashlib", none):
                return megalite_sync()

        def megalite_async() -> dict[str, float]:
            saver = Saver(fresh("megalite"), config(True), mesh)
            began = time.perf_counter()
            saver.start(shards, spans, values, COUNTERS)
            held, steps, final = time.perf_counter() - began, 0, None
            while final is None:
                over, failed = saver.progress()
                step(0.0)
                sums = mesh.world.all_reduce(torch.tensor([over, failed], dtype=torch.float64)).tolist()
                final, steps = saver.settle(*sums), steps + 1
            saved = time.perf_counter() - began
            return {"held": held, "saved": saved, "steps": steps, "step": (saved - held) / steps}

        def dcp_sync() -> dict[str, float]:
            path = fresh("dcp")
            began = time.perf_counter()
            dcp.save(as_dtensors(values), checkpoint_id=str(path))
            took = time.perf_counter() - began
            return {"held": took, "saved": took}

        def dcp_async() -> dict[str, float]:
            path = fresh("dcp")
            began = time.perf_counter()
            future: Any = dcp.async_save(as_dtensors(values), checkpoint_id=str(path), process_group=beside)
            held, steps, over = time.perf_counter() - began, 0, False
            while not over:
                over, steps = step(float(future.done())) == size, steps + 1
            future.result()
            saved = time.perf_counter() - began
            return {"held": held, "saved": saved, "steps": steps, "step": (saved - held) / steps}

        def megalite_load(verify: bool) -> dict[str, float]:
            began = time.perf_counter()
            checkpoint = Path(folder, "megalite", "checkpoints", "step-00000001")
            load(checkpoint, read_manifest(checkpoint), shards, target, spans, verify)
            mesh.world.barrier()
            return {"loaded": time.perf_counter() - began}

        def dcp_load() -> dict[str, float]:
            began = time.perf_counter()
            dcp.load(as_dtensors(target), checkpoint_id=str(Path(folder, "dcp")))
            mesh.world.barrier()
            return {"loaded": time.perf_counter() - began}

        def checked(run: Callable[[], dict[str, float]]) -> dict[str, float]:
            """A load, after which every element has to be what was saved."""
            for named in target.values():
                for x in named.values():
                    x.zero_()
            found = run()
            assert all(target[k][n].equal(values[k][n]) for k in KINDS for n in SHAPES)
            return found

        contenders: dict[str, Callable[[], dict[str, float]]] = {
            "megalite, no checksums": megalite_without_checksums,
            "megalite": megalite_sync,
            "DCP": dcp_sync,
            "load megalite": lambda: checked(lambda: megalite_load(True)),
            "load megalite, not verified": lambda: checked(lambda: megalite_load(False)),
            "load DCP": lambda: checked(dcp_load),
            "megalite async": megalite_async,
            "DCP async": dcp_async,
        }
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
        alone: list[float] = []
        for number in range(rounds + 1):
            for name, contender in contenders.items():
                os.sync()
                mesh.world.barrier()
                found = contender()
                if number:
                    rows[name].append(found)
            began = time.perf_counter()
            for _ in range(10):
                step(0.0)
            alone.append((time.perf_counter() - began) / 10)
        if rank == 0:
            Path(folder, "rows.json").write_text(json.dumps({"rows": rows, "alone": alone[1:]}))
    return 0


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[1], 1) if len(shape) == 2 else (1,)


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    options = parser.parse_args()
    import torch

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
