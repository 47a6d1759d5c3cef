"""Two starts in one run folder: one runs, the other is told at once; the dead and their job do not stand in the way."""

import json
import random
import signal
import time
from pathlib import Path

import pytest
from campaign import rounds
from ranks import Ranks, different, pretrain, run_ranks, whole_tensors

from megalite.checkpoint.folder import complete
from megalite.checkpoint.lock import NAME
from megalite.watch.metrics import read_metrics
from tools.checkpoint import main

STARTS = rounds(3, 20)
STEPS = 150


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    run_ranks(1, pretrain, settings(run_dir, f"train.steps={STEPS}", "checkpoint.interval=10"))
    return run_dir


@pytest.mark.parametrize("number", range(STARTS))
def test_of_two_starts_one_runs_and_one_is_told(settings, straight: Path, tmp_path: Path, number: int) -> None:
    """The second start comes 0 to 1 s after the first, which then takes some seconds."""
    run_dir, delay = tmp_path / "run", random.Random(f"2026 {number}").uniform(0, 1) * (number > 0)
    argv = settings(run_dir, f"train.steps={STEPS}", "checkpoint.interval=10")
    with Ranks(1, pretrain, argv) as first:
        time.sleep(delay)
        with Ranks(1, pretrain, argv) as second:
            both = [first.wait(), second.wait()]
    assert sorted(ended.codes[0] for ended in both) == [0, 2], "\n".join(map(str, both))
    (told,) = (ended for ended in both if ended.codes == [2])
    (line,) = told.err[0].splitlines()
    assert line.startswith(f"error: {run_dir} is in use by "), line
    assert "STOP` asks a run to), or use another folder" in line
    print(f"delay {delay:.3f} s: the {'second' if told is both[1] else 'first'} was told")
    rows = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert different(whole_tensors(complete(run_dir)[-1]), whole_tensors(complete(straight)[-1])) == []
    assert not (run_dir / NAME).exists()
    assert list(run_dir.glob(".LOCK*")) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_start_goes_on_whatever_ended_the_one_before(settings, tmp_path: Path, number: signal.Signals) -> None:
    argv = settings(tmp_path, "train.steps=1000000", "checkpoint.interval=5", "optim.decay_samples=96")
    with Ranks(2, pretrain, [*argv, "parallel.dp=2"]) as ranks:
        deadline = time.monotonic() + 60
        while not complete(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (tmp_path / NAME).exists()
        assert main(["prune", str(tmp_path), "--keep", "1"]) == 2
        ranks.send(number, 0)
        ranks.wait(30)
    assert (tmp_path / NAME).exists() == (number == signal.SIGKILL)
    step = int(complete(tmp_path)[-1].name.removeprefix("step-"))
    run_ranks(1, pretrain, [*argv, f"train.steps={step + 2}"])
    assert read_metrics(tmp_path)["start"][-1]["at_step"] == step
    assert main(["prune", str(tmp_path), "--keep", "1"]) == 0
    assert not (tmp_path / NAME).exists()


def test_a_lock_of_another_machine_is_explained_unless_it_is_of_the_same_job(
    settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"command": "pretrain_7b.py", "host": "node9", "machine": "elsewhere", "pid": 17, "started": 5}
    owner |= {"since": "2026-11-25 14:00:00", "jobs": ["SLURM job 123"]}
    (tmp_path / NAME).write_text(json.dumps(owner))
    argv = settings(tmp_path, "train.steps=1")
    with Ranks(1, pretrain, argv) as ranks:
        ended = ranks.wait()
    assert ended.codes == [2]
    assert "pretrain_7b.py on node9 (process 17, since 2026-11-25 14:00:00, SLURM job 123)" in ended.err[0]
    assert ended.err[0].count("\n") == 1
    run_ranks(1, as_job, argv, "123")
    assert not (tmp_path / NAME).exists()


def as_job(argv: list[str], job: str) -> int:
    """`pretrain` as a job that SLURM has put on another node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", job)
        return pretrain(argv)
