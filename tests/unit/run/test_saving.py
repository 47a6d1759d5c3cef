"""When a run saves, what it reports of a checkpoint, and what a failed save means for it."""

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import TINY

from megalite.checkpoint import save as save_module
from megalite.checkpoint.folder import complete
from megalite.checkpoint.save import SaveFailed
from megalite.checkpoint.state import State
from megalite.config import CheckpointConfig, Config, ParallelConfig, TrainConfig, resolve
from megalite.engine.engine import build
from megalite.parallel.groups import SoloWorld
from megalite.run.saving import Saving
from megalite.watch.metrics import Metrics, read_metrics
from megalite.watch.progress import Progress

Start = Callable[..., tuple[Saving, State]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """The saving of a run at step 3 of 9 of a tiny model, and the state of the run; settings of `checkpoint`."""

    def _start(**checkpoint: Any) -> tuple[Saving, State]:
        train = TrainConfig(seq_len=8, micro_batch_size=1, global_batch_size=1)
        parallel = ParallelConfig(tp=1, pp=1)
        config = resolve(Config(TINY, parallel, train=train, checkpoint=CheckpointConfig(**checkpoint)), 1)
        state = State(step=3, consumed_samples=3)
        engine, metrics = build(config, SoloWorld()), Metrics(tmp_path)
        return Saving(engine, state, tmp_path, metrics, Progress(True, 9, 1)), state

    return _start


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every write of a checkpoint finds the disk full until the list has an element."""
    room: list[Any] = []
    write_rank = save_module.write_rank

    def refuse(building: Path, *more: Any) -> None:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(building))
        write_rank(building, *more)

    monkeypatch.setattr(save_module, "write_rank", refuse)
    return room


def names(run_dir: Path) -> list[str]:
    return [folder.name for folder in complete(run_dir)]


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_checkpoint_is_reported_once_it_is_complete(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], last: bool, async_save: bool
) -> None:
    saving, state = start(async_save=async_save)
    saving.save(last)
    if async_save and not last:  # it is only begun
        assert capsys.readouterr().out == ""
        saving.finish()
    folder = tmp_path / "checkpoints" / "step-00000003"
    assert capsys.readouterr().out == f"checkpoint {folder}\n"
    (row,) = read_metrics(tmp_path)["checkpoint"]
    assert (row["step"], row["folder"]) == (state.step, str(folder))
    saving.finish()
    assert capsys.readouterr().out == ""


def test_a_step_is_saved_once(start: Start, tmp_path: Path) -> None:
    """The interval may fall on the last step of the run."""
    saving, state = start()
    saving.save(last=False)
    saving.save(last=True)
    assert len(read_metrics(tmp_path)["checkpoint"]) == 1
    state.step = state.consumed_samples = 4
    saving.save(last=True)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_one_checkpoint_is_written_at_a_time(start: Start, tmp_path: Path) -> None:
    saving, state = start()
    saving.save(last=False)
    state.step = state.consumed_samples = 4
    saving.save(last=False)  # waits for that of step 3
    assert "step-00000003" in names(tmp_path)
    saving.finish()
    assert [row["step"] for row in read_metrics(tmp_path)["checkpoint"]] == [3, 4]


def test_the_sums_of_a_step_settle_a_save(start: Start, tmp_path: Path) -> None:
    saving, _ = start(async_save=False)
    engine = saving._engine
    saving.saver.start(engine.shards, engine.spans(), engine.state(), dataclasses.asdict(saving._state))
    saving.settle(*saving.saver.progress())
    assert names(tmp_path) == ["step-00000003"]  # published; the next sums tell all ranks
    assert "checkpoint" not in read_metrics(tmp_path)
    saving.settle(*saving.saver.progress())
    assert [row["step"] for row in read_metrics(tmp_path)["checkpoint"]] == [3]


@pytest.mark.parametrize("async_save", [True, False])
def test_a_failed_save_stops_the_run_and_names_both_remedies(
    start: Start, tmp_path: Path, full_disk: list[Any], async_save: bool
) -> None:
    saving, _ = start(async_save=async_save)
    if async_save:  # it is only begun, and heard of when it is waited for
        saving.save(last=False)
    with pytest.raises(SaveFailed) as caught:
        saving.finish() if async_save else saving.save(last=False)
    text = str(caught.value)
    assert text.startswith("rank 0 cannot write the checkpoint of step 3: No space left on device")
    assert "; those before it are untouched. " in text
    assert text.endswith(", or set checkpoint.on_failure=continue to train on without it")
    assert "\n" not in text
    assert names(tmp_path) == []
    assert list((tmp_path / "checkpoints").glob(".building*")) == []


def test_a_failed_save_may_be_a_warning(
    start: Start, tmp_path: Path, full_disk: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    saving, state = start(on_failure="continue")
    saving.save(last=False)
    saving.finish()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("WARNING: rank 0 cannot write the checkpoint of step 3: No space left on device")
    assert line.endswith("; those before it are untouched, the next try is at the next interval")
    (row,) = read_metrics(tmp_path)["checkpoint_failed"]
    assert row["step"] == 3
    full_disk.append("there is room")
    state.step = state.consumed_samples = 4
    saving.save(last=True)
    assert names(tmp_path) == ["step-00000004"]


def test_the_last_checkpoint_may_not_fail(start: Start, full_disk: list[Any]) -> None:
    """To train on without it is no remedy then."""
    saving, _ = start(on_failure="continue")
    with pytest.raises(SaveFailed, match=r"cannot write the checkpoint of step 3") as caught:
        saving.save(last=True)
    assert "on_failure" not in str(caught.value)
