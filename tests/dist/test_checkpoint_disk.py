"""A disk that refuses costs the checkpoint being written and nothing else, and every rank hears of it."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ended, Ranks, different, pretrain, refused, run_ranks, whole_tensors

from megalite.checkpoint.folder import complete
from megalite.watch.metrics import read_metrics

STEPS = 5
CUT = ["parallel.dp=2", "parallel.zero=1", f"train.steps={STEPS}", "checkpoint.interval=1"]


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    run_dir = tmp_path_factory.mktemp("straight")
    run_ranks(2, pretrain, settings(run_dir, *CUT, "checkpoint.keep=0"))
    return run_dir


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes; only root may."""
    folder = tmp_path / "disk"

    def mount(size: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("no right to mount a tmpfs; the limit on file sizes is tested in any case")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def pretrain_limited(argv: list[str], rank: int, steps: range) -> int:
    """`pretrain`, in which files of one rank may have 3000 bytes at most while it saves `steps`."""
    from megalite.checkpoint.save import Saver

    whole_start = Saver.start

    def limited(saver: Saver, shards: Any, spans: Any, kinds: Any, state: dict[str, Any]) -> None:
        limit = 3000 if state["step"] in steps and os.environ["RANK"] == str(rank) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        whole_start(saver, shards, spans, kinds, state)

    Saver.start = limited
    return pretrain(argv)


def pretrain_blind(argv: list[str], free: int) -> int:
    """`pretrain` that is told of so many free bytes, whatever is true."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(free, 0, free)
    return pretrain(argv)


def failed(ranks: Ranks) -> str:
    """The one line in which the run ended."""
    ended = ranks.wait(30)
    assert set(ended.codes) <= {1, 2}, ended
    assert 2 in ended.codes, ended
    (line,) = "".join(ended.err).splitlines()
    return line


def goes_on(settings, run_dir: Path, straight: Path, steps: list[int]) -> Ended:
    """These checkpoints are left and no half of one, and from them the run ends as the one that nothing stopped."""
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("[!l]*")) == [f"step-{s:08d}" for s in steps]
    assert list((run_dir / "checkpoints").glob(".*")) == []
    shutil.rmtree(complete(run_dir)[0])  # room is made
    ended = run_ranks(2, pretrain, settings(run_dir, *CUT, "checkpoint.keep=1"))
    equal(run_dir, straight)
    return ended


def equal(run_dir: Path, straight: Path) -> None:
    assert losses(run_dir) == losses(straight)
    assert different(whole_tensors(complete(run_dir)[-1]), whole_tensors(complete(straight)[-1])) == []


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir)["train"]}


@pytest.mark.parametrize("async_save", ["true", "false"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_write_stops_all(
    settings, straight: Path, tmp_path: Path, rank: int, async_save: str
) -> None:
    argv = settings(tmp_path, *CUT, f"checkpoint.async_save={async_save}")
    with Ranks(2, pretrain_limited, argv, rank, range(3, 9)) as ranks:
        line = failed(ranks)
    words = f"error: rank {rank} cannot write the checkpoint of step 3: File too large; those before it are untouched. "
    assert line.startswith(words), line
    assert "checkpoint.on_failure=continue" in line
    goes_on(settings, tmp_path, straight, [1, 2])


@pytest.mark.parametrize("async_save", ["true", "false"])
def test_a_run_may_go_on_without_a_checkpoint(settings, straight: Path, tmp_path: Path, async_save: str) -> None:
    argv = settings(tmp_path, *CUT, f"checkpoint.async_save={async_save}", "checkpoint.on_failure=continue")
    with Ranks(2, pretrain_limited, argv, 1, range(2, 4)) as ranks:
        ended = ranks.wait(30)
    assert ended.codes == [0, 0], ended
    for step in (2, 3):
        assert f"WARNING: rank 1 cannot write the checkpoint of step {step}: File too large" in ended.out[0]
    assert [folder.name for folder in complete(tmp_path)] == ["step-00000004", "step-00000005"]
    assert [row["step"] for row in read_metrics(tmp_path)["checkpoint"]] == [1, 4, 5]
    equal(tmp_path, straight)


def test_the_last_checkpoint_of_a_run_may_not_fail(settings, straight: Path, tmp_path: Path) -> None:
    argv = settings(tmp_path, *CUT, "checkpoint.on_failure=continue")
    with Ranks(2, pretrain_limited, argv, 1, range(STEPS, STEPS + 1)) as ranks:
        line = failed(ranks)
    assert "rank 1 cannot write the checkpoint of step 5" in line
    goes_on(settings, tmp_path, straight, [3, 4])


def test_room_is_looked_for_before_a_byte_is_written(settings, tmp_path: Path) -> None:
    with Ranks(2, pretrain_blind, settings(tmp_path, *CUT), 1000) as ranks:
        line = failed(ranks)
    assert "cannot write the checkpoint of step 1: it needs " in line
    assert f"bytes, 1,000 are free ({tmp_path}/checkpoints)" in line
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("blind", [False, True])
def test_a_full_disk(settings, straight: Path, tmpfs: Callable[[int], Path], blind: bool) -> None:
    """Room for two and a half: the third does not fit. Blind: it is begun all the same, and meets the disk's end."""
    size = sum(path.stat().st_size for path in complete(straight)[0].iterdir())
    run_dir = tmpfs(int(2.5 * size) + 2**16) / "run"
    argv = settings(run_dir, *CUT, "checkpoint.keep=0")
    with Ranks(2, *((pretrain_blind, argv, 10**12) if blind else (pretrain, argv))) as ranks:
        line = failed(ranks)
    reason = "No space left on device" if blind else "it needs "
    assert f"cannot write the checkpoint of step 3: {reason}" in line
    goes_on(settings, run_dir, straight, [1, 2])


def test_a_disk_that_cannot_be_written(settings, tmpfs: Callable[[int], Path]) -> None:
    disk = tmpfs(2**20)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    words = f"train.run_dir={disk}/run cannot be written (Read-only file system)"
    refused(settings(disk / "run", "train.steps=1"), words, ranks=1)
