"""A checkpoint is published as soon as every rank's part is written, however long the step under way takes."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from models import TINY

from megalite.checkpoint import save as save_module
from megalite.checkpoint.folder import complete, read_manifest, step_folder
from megalite.checkpoint.save import Saver
from megalite.checkpoint.state import State
from megalite.config import CheckpointConfig, Config, ParallelConfig, TrainConfig, check, resolve
from megalite.engine.engine import Engine, build
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

RANKS = 4


def begin(world: World, run_dir: Path, async_save: bool = True, step: int = 3) -> tuple[Engine, Saver]:
    """This rank's engine and a save of it that is under way."""
    model = TINY
    parallel = ParallelConfig(pp=2, dp=2, zero=1, bucket_mb=0.005)
    train = TrainConfig(seq_len=8, micro_batch_size=1, global_batch_size=2, dtype="bf16")
    config = resolve(
        Config(model, parallel, train=train, checkpoint=CheckpointConfig(keep=1, async_save=async_save)), RANKS
    )
    check(config, RANKS)
    engine = build(config, world)
    saver = Saver(run_dir, config, engine.mesh)
    values = dataclasses.asdict(State(step=step, consumed_samples=2 * step))
    saver.start(engine.shards, engine.spans(), engine.state(), values)
    return engine, saver


def wait(seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nobody_has_to_take_a_step(tmp_path: Path) -> None:
    def main(world: World) -> None:
        _, saver = begin(world, tmp_path)
        wait(lambda: complete(tmp_path))  # no collective in between
        assert saver.finish() == step_folder(tmp_path, 3)

    run_threads(RANKS, main)
    read_manifest(step_folder(tmp_path, 3))


def test_a_run_that_leaves_publishes_what_all_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a peer is gone: no collective can be had any more. What is written is not thrown away."""
    monkeypatch.setattr(save_module, "LOOK_S", 60.0)
    others = threading.Barrier(RANKS)

    def main(world: World) -> None:
        _, saver = begin(world, tmp_path)
        if world.rank:
            saver.close()
        others.wait()
        saver.close()
        saver.close()

    run_threads(RANKS, main)
    assert complete(tmp_path) == [step_folder(tmp_path, 3)]


def test_a_run_that_leaves_does_not_wait_for_parts_that_never_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = save_module.write_rank

    def torn(building: Path, rank: int, *rest: object) -> None:
        if rank != 2:
            whole(building, rank, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(save_module, "write_rank", torn)

    def main(world: World) -> None:
        _, saver = begin(world, tmp_path)
        began = time.monotonic()
        saver.close()
        assert time.monotonic() - began < 5

    run_threads(RANKS, main)
    assert complete(tmp_path) == []
    assert len(list((tmp_path / "checkpoints" / ".building-step-00000003").glob("rank-*.json"))) == 3


@pytest.mark.parametrize("async_save", [True, False])
def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    def stuck(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "step-00000001")

    monkeypatch.setattr(save_module, "prune", stuck)

    def main(world: World) -> None:
        _, saver = begin(world, tmp_path, async_save)
        with pytest.raises(
            save_module.SaveFailed,
            match=r"^rank 0 has written the checkpoint of step 3 and cannot remove an older one: Permission den",
        ):
            saver.finish()

    run_threads(RANKS, main)
    assert complete(tmp_path) == [step_folder(tmp_path, 3)]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000003"]
