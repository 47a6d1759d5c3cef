"""However a run is told to stop, every rank saves at one step and nothing is lost; a killed rank ends the others."""

import signal
import time
from pathlib import Path

import pytest
from ranks import Ended, Ranks, different, pretrain, pretrain_with, run_ranks, whole_tensors
from test_faults_campaign import pretrain_hit

from megalite.checkpoint.folder import complete
from megalite.watch.metrics import read_metrics

RANKS, STEPS = 4, 12
CUT = ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=4", "optim.lr_schedule=cosine", f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    run_dir = tmp_path_factory.mktemp("straight")
    run_ranks(RANKS, pretrain, settings(run_dir, *CUT))
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)["train"]]


def newest(run_dir: Path) -> dict:
    return whole_tensors(complete(run_dir)[-1])


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while len(read_metrics(run_dir).get("train", [])) < step:
        assert time.monotonic() < deadline, f"{run_dir}: no step {step} after {timeout_s} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGTERM, 3), (signal.SIGUSR1, 1), (signal.SIGINT, 2)]
)
def test_a_signal_to_one_rank_stops_all_at_one_step(
    settings, straight: Path, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    argv = settings(tmp_path / "run", *CUT)
    ended = run_ranks(RANKS, pretrain_with, argv, rank, 5, number)
    reason = number.name if rank == 0 else "another rank received a stop signal"
    assert f"stopped at step 5: {reason}; run the same command to resume" in ended.out[0]
    assert "".join(ended.err) == ""
    assert [folder.name for folder in complete(tmp_path / "run")] == ["step-00000005"]

    run_ranks(RANKS, pretrain, argv)
    assert losses(tmp_path / "run") == losses(straight)
    assert different(newest(tmp_path / "run"), newest(straight)) == []


def test_a_stop_file_stops_all_at_one_step(settings, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Ranks(RANKS, pretrain, settings(run_dir, *CUT, "train.steps=1000000", "optim.decay_samples=96")) as ranks:
        wait_for_step(run_dir, 2)
        (run_dir / "STOP").touch()
        ended = ranks.wait()
    stopped_and_goes_on(settings, run_dir, ended, "STOP file")
    assert not (run_dir / "STOP").exists()
    common = min(STEPS, len(losses(run_dir)))
    assert losses(run_dir)[:common] == losses(straight)[:common]


def test_the_time_limit_stops_all_at_one_step(settings, tmp_path: Path) -> None:
    with Ranks(RANKS, pretrain, settings(tmp_path, *CUT, "train.steps=1000000", "train.time_limit_s=0.5")) as ranks:
        ended = ranks.wait()
    stopped_and_goes_on(settings, tmp_path, ended, "train.time_limit_s")


def stopped_and_goes_on(settings, run_dir: Path, ended: Ended, reason: str) -> None:
    """All exited 0 with one checkpoint at the last step in the metrics, and two more steps follow it."""
    assert ended.codes == [0] * RANKS, ended
    step = len(losses(run_dir))
    assert f"stopped at step {step}: {reason}" in ended.out[0]
    assert [folder.name for folder in complete(run_dir)] == [f"step-{step:08d}"]
    run_ranks(RANKS, pretrain, settings(run_dir, *CUT, f"train.steps={step + 2}", "optim.decay_samples=96"))
    assert [row["step"] for row in read_metrics(run_dir)["train"]] == list(range(1, step + 3))


@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_while_a_run_starts_stops_it_before_the_first_step(
    settings, straight: Path, tmp_path: Path, rank: int
) -> None:
    argv, run_dir = settings(tmp_path / "run", *CUT), tmp_path / "run"
    ended = run_ranks(RANKS, pretrain_hit, argv, rank, "weights", signal.SIGTERM, tmp_path / "clock")
    reason = "SIGTERM" if rank == 0 else "another rank received a stop signal"
    assert f"stopped before step 1: {reason}; run the same command to resume" in ended.out[0]
    assert "".join(ended.err) == ""
    assert complete(run_dir) == []
    assert (run_dir / "REQUEUE").read_text().startswith(f"step 0\nreason {reason}\n")
    run_ranks(RANKS, pretrain, argv)
    assert losses(run_dir) == losses(straight)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_before_there_is_a_world_ends_all(settings, tmp_path: Path, rank: int) -> None:
    argv = settings(tmp_path / "run", *CUT, "parallel.timeout_s=10")
    with Ranks(RANKS, pretrain_hit, argv, rank, "reports", signal.SIGTERM, tmp_path / "clock") as ranks:
        ended = ranks.wait(30)
    assert ended.codes[rank] == 128 + signal.SIGTERM, ended
    assert set(ended.codes) == {1, 128 + signal.SIGTERM}, ended
    assert "Traceback" not in str(ended)
    assert 1 <= "".join(ended.err).count("\n") <= 2
    assert "".join(ended.out).count("step ") == 0


def test_a_second_interrupt_ends_at_once(settings, tmp_path: Path) -> None:
    with Ranks(RANKS, pretrain_with, settings(tmp_path, *CUT), 1, 3, signal.SIGINT, signal.SIGINT) as ranks:
        ended = ranks.wait(20)
    assert ended.codes[1] == 130, ended
    assert ended.err[1] == ""
    lost_the_others(ended, 1)
    assert complete(tmp_path) == []


@pytest.mark.parametrize(("rank", "served"), [(0, False), (2, True)])
def test_a_killed_rank_ends_the_others(settings, tmp_path: Path, rank: int, served: bool) -> None:
    argv = settings(tmp_path, *CUT, "train.steps=1000000", "checkpoint.interval=2")
    with Ranks(RANKS, pretrain, argv, served=served) as ranks:
        wait_for_step(tmp_path, 3)
        # a save beside the training is there some steps later
        while not complete(tmp_path) and any(process.is_alive() for process in ranks.processes):
            time.sleep(0.01)
        ranks.send(signal.SIGKILL, rank)
        killed = time.monotonic()
        ended = ranks.wait(20)
    assert time.monotonic() - killed < 10
    assert ended.codes[rank] == -signal.SIGKILL, ended
    lost_the_others(ended, rank)
    assert complete(tmp_path)


def lost_the_others(ended: Ended, gone: int) -> None:
    """The ranks left exit 1, and one of them names the one that is gone."""
    left = [rank for rank in range(RANKS) if rank != gone]
    assert {ended.codes[rank] for rank in left} == {1}, ended
    (line,) = (line for rank in left for line in ended.err[rank].splitlines())
    assert line.startswith(f"error: rank {gone} on "), ended
    assert "died without a message" in line
