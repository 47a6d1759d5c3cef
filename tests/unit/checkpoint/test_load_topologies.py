"""Saved at any topology, loaded at any other: every tensor the same to the bit, and the run goes on as it would have.

Every rank is a thread; engine, save and load are the real ones. tests/dist/test_resume.py has real processes.
"""

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import tiny
from torch import Tensor

from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.save import save
from megalite.config import Config, OptimConfig, ParallelConfig, TrainConfig, check, resolve
from megalite.engine import restore
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.optim.adamw import clip_scale
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

SEQ, BATCH, MICROBATCHES = 8, 1, 2
BEFORE, AFTER = 3, 10  # steps before the save, and after it


@dataclass(frozen=True)
class Topology:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0
    stages: tuple[int, ...] | None = None
    schedule: str = "1f1b"
    chunks: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp


# of four heads over two kv heads; tp 4 replicates these, 101 words are padded by tp 2 and 4
TOPOLOGIES = {
    "one": Topology(),
    "tp2": Topology(tp=2),
    "pp2": Topology(pp=2),
    "tp2pp2dp2zero": Topology(tp=2, pp=2, dp=2, zero=1),
    "uneven": Topology(pp=2, stages=(1, 2)),
    "tp4": Topology(tp=4),
    "interleaved": Topology(schedule="interleaved", chunks=3),
    "zb-h1": Topology(pp=2, schedule="zb-h1"),
}
ONLY_STAGES = {"one", "pp2", "uneven", "interleaved", "zb-h1"}  # differ in stages alone


def config(topology: str, dtype: str) -> Config:
    t = TOPOLOGIES[topology]
    # untied in fp32, where pp would change the order in which the tied gradient is summed
    model = tiny(num_layers=3, qkv_bias=True, tie_embeddings=dtype == "bf16")
    mesh = {"tp": t.tp, "pp": t.pp, "dp": t.dp, "zero": t.zero, "stages": t.stages}
    parallel = ParallelConfig(**mesh, schedule=t.schedule, chunks=t.chunks, sp=False, bucket_mb=0.005)
    train = TrainConfig(dtype=dtype, seq_len=SEQ, micro_batch_size=BATCH, global_batch_size=BATCH * MICROBATCHES)
    found = resolve(Config(model, parallel, optim=OptimConfig(lr=1e-2), train=train), t.ranks)
    check(found, t.ranks)
    return found


def take_step(engine: Engine, step: int) -> float:
    """One step on random tokens, the same at every topology; gives the mean loss."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for _ in range(MICROBATCHES):
        tokens = torch.randint(101, (BATCH, SEQ + 1), generator=generator)
        positions = torch.arange(SEQ).expand(BATCH, SEQ)
        found.append(Microbatch(tokens[:, :-1], tokens[:, 1:], torch.ones(BATCH, SEQ), positions))
    dp = engine.mesh.dp
    loss, tokens = engine.forward_backward(found[dp.rank :: dp.size]).values()
    sums = torch.tensor([loss, tokens, engine.gradient_squares()], dtype=torch.float64)
    loss, tokens, squares = engine.mesh.world.all_reduce(sums).tolist()
    engine.update(1e-2, clip_scale(engine.config.optim, squares, tokens)[1])
    return loss / tokens


def write(engine: Engine, run_dir: Path, step: int) -> Path:
    values = dataclasses.asdict(restore.State(step=step, consumed_samples=BATCH * MICROBATCHES * step))
    return save(run_dir, engine.config, engine.mesh, engine.shards, engine.spans(), engine.state(), values)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked here is what was written; waiting for the disk a thousand times would only take time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """(checkpoint, losses of the steps after it without a stop) of a topology."""

    @functools.cache
    def _saved(topology: str, dtype: str) -> tuple[Path, list[float]]:
        run_dir = tmp_path_factory.mktemp(topology)

        def main(world: World) -> tuple[Path, list[float]]:
            engine = build(config(topology, dtype), world)
            for step in range(BEFORE):
                take_step(engine, step)
            folder = write(engine, run_dir, BEFORE)
            return folder, [take_step(engine, BEFORE + n) for n in range(AFTER)]

        return run_threads(TOPOLOGIES[topology].ranks, main)[0]

    return _saved


def contents(folder: Path) -> dict[str, Tensor]:
    manifest = read_manifest(folder)
    return {name: read_tensor(folder, manifest, name) for name in manifest["tensors"]}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("there", TOPOLOGIES)
@pytest.mark.parametrize("here", TOPOLOGIES)
def test_every_topology_loads_every_other(saved, tmp_path: Path, here: str, there: str, dtype: str) -> None:
    source, straight = saved(there, dtype)
    steps = AFTER if dtype == "fp32" else 0

    def main(world: World) -> tuple[Path, list[float]]:
        c = config(here, dtype)
        engine = build(c, world, lambda name, shape: torch.full(shape, torch.nan))
        state = restore.load(engine, source, restore.State(), True)
        assert state.step == BEFORE
        return write(engine, tmp_path, BEFORE), [take_step(engine, BEFORE + n) for n in range(steps)]

    again, losses = run_threads(TOPOLOGIES[here].ranks, main)[0]
    before, after = contents(source), contents(again)
    assert before.keys() == after.keys()
    assert {name.split(".")[0] for name in before} == {"weight", "exp_avg", "exp_avg_sq"} | (
        {"master"} if dtype == "bf16" else set()
    )
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(x.dtype == after[name].dtype for name, x in before.items())

    exact = here == there or {here, there} <= ONLY_STAGES
    tolerance = 0.0 if exact else 1e-5
    assert [(a, b) for a, b in zip(losses, straight) if abs(a - b) > tolerance * b] == []
