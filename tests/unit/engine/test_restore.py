"""What an engine is filled with: fresh weights, its newest good checkpoint, other weights, a larger vocabulary."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from models import TINY

from megalite.checkpoint.folder import step_folder
from megalite.checkpoint.manifest import Damaged
from megalite.checkpoint.save import save
from megalite.checkpoint.state import State
from megalite.config import Config, ParallelConfig, Resolved, TrainConfig, resolve
from megalite.engine import restore
from megalite.engine.engine import Engine, build
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads


def config(tp: int = 1, **checkpoint: object) -> Resolved:
    found = Config(
        model=TINY,
        parallel=ParallelConfig(tp=tp, pp=1, dp=1, sp=False),
        train=TrainConfig(seq_len=8, micro_batch_size=1, global_batch_size=1),
    )
    return resolve(dataclasses.replace(found, checkpoint=dataclasses.replace(found.checkpoint, **checkpoint)), tp)


def write(run_dir: Path, *steps: int) -> Engine:
    """Checkpoints of a new engine; each step adds 1 to every weight."""
    engine = build(config(), SoloWorld())
    for step in steps:
        with torch.no_grad():
            for parameter in engine.stored().values():
                parameter.add_(1.0)
        engine.optimizer.adopt()
        state = dataclasses.asdict(State(step=step, consumed_samples=step, data="corpus"))
        save(run_dir, engine.config, engine.mesh, engine.shards, engine.spans(), engine.state(), state)
    return engine


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.stored().items()}


def damage(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1)


def test_nothing_to_load(tmp_path: Path) -> None:
    engine = build(config(), SoloWorld())
    before = weights(engine)
    assert restore.first_state(engine, "corpus", None, print) == (None, State(data="corpus"))
    assert all(torch.equal(x, before[name]) for name, x in weights(engine).items())


def test_the_newest_checkpoint_that_is_good_is_loaded_on_every_rank(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    damage(step_folder(tmp_path, 3))

    def main(world: World) -> tuple[Path | None, State, list[str], float]:
        engine, said = build(config(tp=2), world), list[str]()
        before = weights(engine)["layers.0.attn_norm.weight"]
        source, state = restore.first_state(engine, "corpus", step_folder(tmp_path, 3), said.append)
        return source, state, said, float((weights(engine)["layers.0.attn_norm.weight"] - before).mean())

    for source, state, said, added in run_threads(2, main):
        assert source == step_folder(tmp_path, 2)
        assert state == State(step=2, consumed_samples=2, data="corpus")
        assert added == 2.0
        assert said[0].startswith(f"note: {step_folder(tmp_path, 3)}")
        assert said[-1] == f"loaded {source}, at step 2"


def test_without_a_good_checkpoint_all_are_named(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for step in (1, 2):
        damage(step_folder(tmp_path, step))
    with pytest.raises(Damaged, match=r"no checkpoint can be loaded: .*step-00000002/.*step-00000001/"):
        restore.first_state(build(config(), SoloWorld()), "corpus", step_folder(tmp_path, 2), print)


def test_other_data_is_noted_and_kept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    said: list[str] = []
    _, state = restore.first_state(build(config(), SoloWorld()), "another", step_folder(tmp_path, 1), said.append)
    assert state.data == "another"
    assert "note: the data was corpus and is now another; the order of samples changes" in said


def test_weights_alone_leave_state_and_moments(tmp_path: Path) -> None:
    written = write(tmp_path, 5)
    engine = build(config(load=str(tmp_path), load_optim=False), SoloWorld())
    source, state = restore.first_state(engine, "corpus", None, print)
    assert source == step_folder(tmp_path, 5)
    assert state == State(data="corpus")
    expected = weights(written)
    assert all(torch.equal(x, expected[name]) for name, x in weights(engine).items())


@pytest.mark.parametrize("tp", [1, 2])
def test_new_rows_of_the_vocabulary_are_the_mean_of_the_old(tp: int) -> None:
    old = torch.randn(99, 24, generator=torch.Generator().manual_seed(0))

    def main(world: World) -> dict[str, torch.Tensor]:
        engine = build(config(tp=tp), world)
        parameters = engine.stored()
        restore.add_rows(engine, parameters, range(99, 101), lambda name: old)
        assert not set(restore.VOCABULARY) & parameters.keys()
        shards = {name: engine.shards[name] for name in restore.VOCABULARY}
        whole = {name: torch.zeros(101, 24) for name in restore.VOCABULARY}
        for name, shard in shards.items():
            shard.put(engine.stored()[name].detach(), whole[name])
        return whole

    ranks = run_threads(tp, main)
    for name in restore.VOCABULARY:
        rows = torch.stack([rank[name] for rank in ranks]).sum(0)
        assert torch.equal(rows[:99], old)
        assert torch.equal(rows[99], rows[100])
        assert torch.allclose(rows[99], old.mean(0))


def test_no_new_rows_read_nothing() -> None:
    engine = build(config(), SoloWorld())
    parameters = engine.stored()
    restore.add_rows(engine, parameters, range(0), lambda name: pytest.fail("read"))
    assert parameters.keys() == engine.stored().keys()
