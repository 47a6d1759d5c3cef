"""A run killed at any point of a save goes on from a whole checkpoint as if nothing had happened."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, different, pretrain, run_ranks, whole_tensors

from megalite.checkpoint.faults import POINTS
from megalite.checkpoint.folder import complete, read_manifest
from megalite.watch.metrics import read_metrics

STEPS = 4
# both ranks own a part of everything: ZeRO shares end within rows
CUT = ["parallel.dp=2", "parallel.zero=1", f"train.steps={STEPS}", "checkpoint.interval=1"]
ALONE = POINTS.index("save.before_manifest")  # from here on rank 0 works alone
CASES = [(point, rank) for n, point in enumerate(POINTS) for rank in ((0, 1) if n < ALONE else (0,))]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    run_dir = tmp_path_factory.mktemp("straight")
    run_ranks(2, pretrain, settings(run_dir, *CUT))
    return run_dir


def nth(point: str, rank: int, run_dir: Path) -> int:
    """The passage of `point` that lies in the middle of the third save, when two checkpoints are there."""
    if point == "save.in_prune":
        return 1  # the first two saves have nothing to prune
    if not point.endswith("_block"):
        return 3
    tensors = read_manifest(complete(run_dir)[-1])["tensors"].values()
    blocks = sum(block["file"].startswith(f"rank-{rank:05d}") for tensor in tensors for block in tensor["blocks"])
    assert blocks > 10
    return 2 * blocks + blocks // 2


def faulty(argv: list[str], order: str) -> int:
    os.environ["MEGALITE_FAULT"] = order
    return pretrain(argv)


@pytest.mark.parametrize("async_save", ["true", "false"])
@pytest.mark.parametrize(("point", "rank"), CASES)
def test_a_kill_at_any_point_loses_nothing(
    settings, straight: Path, tmp_path: Path, point: str, rank: int, async_save: str
) -> None:
    argv = settings(tmp_path, *CUT, f"checkpoint.async_save={async_save}")
    with Ranks(2, faulty, argv, f"{point}:{rank}:{nth(point, rank, straight)}") as ranks:
        ended = ranks.wait(30)
    assert ended.codes[rank] == -signal.SIGKILL, ended
    assert ended.codes[1 - rank] in (0, 1), ended

    left = [folder.name for folder in complete(tmp_path)]
    # beside the training a checkpoint is published as soon as every rank's part is written
    written = async_save == "true" and (point, rank) == ("save.after_part", 1)
    published = written or POINTS.index(point) >= POINTS.index("save.after_rename")
    assert left[-1] == ("step-00000003" if published else "step-00000002")
    ended = run_ranks(2, pretrain, argv)
    assert f"loaded {tmp_path}/checkpoints/{left[-1]}, at step" in ended.out[0]
    assert losses(tmp_path) == losses(straight)
    assert different(whole_tensors(complete(tmp_path)[-1]), whole_tensors(complete(straight)[-1])) == []
    # nothing of the dead save is left
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000004\n"


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir)["train"]}


def slow_step(argv: list[str], step: int) -> int:
    """`pretrain`, in which every rank is long at one step."""
    from megalite.run import trainer

    whole_step = trainer.train_step

    def slow(engine: Any, objective: Any, dataset: Any, state: Any, *more: Any) -> Any:
        if state.step + 1 == step:
            time.sleep(600)
        return whole_step(engine, objective, dataset, state, *more)

    trainer.train_step = slow
    return pretrain(argv)


def test_a_kill_in_a_long_step_keeps_the_checkpoint_before_it(settings, straight: Path, tmp_path: Path) -> None:
    """It is published while the step is under way, not at its end."""
    argv = settings(tmp_path, *CUT)
    with Ranks(2, slow_step, argv, 3) as ranks:
        deadline = time.monotonic() + 30
        while len(complete(tmp_path)) < 2 or (tmp_path / "checkpoints" / "latest").read_text() != "step-00000002\n":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for rank in range(2):
            ranks.send(signal.SIGKILL, rank)
        ranks.wait(30)
    ended = run_ranks(2, pretrain, argv)
    assert f"loaded {tmp_path}/checkpoints/step-00000002, at step 2" in ended.out[0]
    assert losses(tmp_path) == losses(straight)


def test_an_unknown_point_is_refused_in_one_line(settings, tmp_path: Path) -> None:
    with Ranks(1, faulty, settings(tmp_path, "train.steps=1"), "save.before_renam:0:1") as ranks:
        ended = ranks.wait()
    assert ended.codes == [2]
    (line,) = ended.err[0].splitlines()
    assert line.startswith(
        "error: MEGALITE_FAULT=save.before_renam:0:1 is not POINT:RANK:N; the points are save.before_folder, "
    )
