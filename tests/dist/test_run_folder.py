"""A run whose folder is removed or whose disk is full outside a save: said with the file, and the weights are saved."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Ended, Ranks, different, pretrain, run_ranks, whole_tensors

from megalite.checkpoint.folder import complete
from megalite.checkpoint.lock import NAME
from megalite.watch.metrics import read_metrics

CUT = ["parallel.dp=2", "parallel.zero=1", "optim.decay_samples=96"]
LONG = "train.steps=1000000"


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir).get("train", [])]


def wait(seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def goes_on(settings, run_dir: Path, tmp_path: Path) -> None:
    """From the newest checkpoint, to the weights of a run that nothing disturbed."""
    step = int(complete(run_dir)[-1].name.removeprefix("step-")) + 2
    run_ranks(2, pretrain, settings(run_dir, *CUT, f"train.steps={step}"))
    straight = tmp_path / "straight"
    run_ranks(2, pretrain, settings(straight, *CUT, f"train.steps={step}"))
    assert different(whole_tensors(complete(run_dir)[-1]), whole_tensors(complete(straight)[-1])) == []


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
@pytest.mark.parametrize("way", ["removed", "renamed"])
def test_a_run_folder_that_is_removed(settings, tmp_path: Path, way: str, on_failure: str) -> None:
    run_dir = tmp_path / "run"
    argv = settings(run_dir, *CUT, LONG, f"checkpoint.on_failure={on_failure}")
    with Ranks(2, pretrain, argv) as ranks:
        wait(lambda: len(steps(run_dir)) > 3)
        run_dir.rename(tmp_path / "old")
        if way == "removed":
            shutil.rmtree(tmp_path / "old")
        if on_failure == "continue":
            wait(lambda: len(steps(run_dir)) > 3)
            (run_dir / "STOP").touch()
        ended = ranks.wait(60)
    words = f"{run_dir} was removed or renamed while the run was writing to it; it is made again, without its older"
    if on_failure == "stop":
        assert ended.codes[0] == 2, ended
        assert f"error: {words}" in ended.err[0]
        assert "stopped at step" in ended.out[0]
        assert "Free some space" not in str(ended)
    else:
        assert ended.codes == [0, 0], ended
        assert ended.out[0].count(f"WARNING: {words}") == 1
    requeue = ["REQUEUE", "STOP"] if on_failure == "continue" else []
    # code.json and code.diff: only from a git checkout
    left = sorted(name for name in os.listdir(run_dir) if not name.startswith("code."))
    assert left == [*requeue, "checkpoints", "config.yaml", "metrics.jsonl"]
    assert steps(run_dir)
    assert not (run_dir / NAME).exists()
    goes_on(settings, run_dir, tmp_path)


def test_a_folder_that_another_run_has_taken_is_left_to_it(settings, tmp_path: Path) -> None:
    """The user removed it and started anew, and the first run still ran."""
    run_dir = tmp_path / "run"
    with Ranks(1, pretrain, settings(run_dir, LONG)) as first:
        wait(lambda: len(steps(run_dir)) > 3)
        first.send(signal.SIGSTOP, 0)
        shutil.rmtree(run_dir)
        with Ranks(1, pretrain, settings(run_dir, LONG)) as second:
            wait(lambda: len(steps(run_dir)) > 3)
            first.send(signal.SIGCONT, 0)
            ended = first.wait(60)
            (run_dir / "STOP").touch()
            assert second.wait(60).codes == [0]
    assert ended.codes == [2], ended
    (line,) = ended.err[0].splitlines()
    assert line.startswith(f"error: {run_dir} was removed or renamed while the run was writing to it: {run_dir} is in")
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [row.count('"train"') for row in rows].count(1) == len(steps(run_dir))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; only root may mount it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs; tests/unit/watch/test_metrics.py has a disk that refuses in any case")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take every byte that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def run_on_a_full_disk(settings, disk: Path, on_failure: str) -> Ended:
    """Filled between two steps, and freed again some steps later."""
    run_dir = disk / "run"
    argv = settings(run_dir, *CUT, LONG, f"checkpoint.on_failure={on_failure}")
    with Ranks(2, pretrain, argv) as ranks:
        wait(lambda: len(steps(run_dir)) > 3)
        ballast = fill(disk)
        if on_failure == "continue":
            before = -1
            while before != steps(run_dir)[-1]:  # the file's last block has room for some lines
                before = steps(run_dir)[-1]
                time.sleep(1.0)
            ballast.unlink()
            wait(lambda: steps(run_dir)[-1] > before + 10)
            (run_dir / "STOP").touch()
        return ranks.wait(60)


def test_a_disk_that_is_full_outside_a_save_ends_the_run_with_the_file_named(settings, small_disk: Path) -> None:
    ended = run_on_a_full_disk(settings, small_disk, "stop")
    assert 2 in ended.codes, ended
    text = "".join(ended.err)
    # the last save does not fit either; whichever of the two is said, it is the disk, with its remedy
    assert f"{small_disk}/run" in text or "cannot write the checkpoint of step" in text
    assert "Free some space on that disk" in text
    assert (small_disk / "run" / "config.yaml").stat().st_size > 0


def test_a_disk_that_is_full_for_a_while_costs_nothing(settings, small_disk: Path, tmp_path: Path) -> None:
    run_dir = small_disk / "run"
    ended = run_on_a_full_disk(settings, small_disk, "continue")
    assert ended.codes == [0, 0], ended
    words = f"WARNING: {run_dir}/metrics.jsonl cannot be written: No space left on device. Free some space on that disk"
    assert ended.out[0].count(words) == 1
    found = steps(run_dir)
    assert found == list(range(1, found[-1] + 1))  # lines of that time were kept


def test_an_empty_configuration_of_a_run_is_written_again(settings, tmp_path: Path) -> None:
    """As a disk that was full at a start has left it."""
    argv = settings(tmp_path, "train.steps=2")
    run_ranks(1, pretrain, argv)
    whole = (tmp_path / "config.yaml").read_text()
    for torn, said in (("", "config.yaml is empty"), ("model:\n  x: [", "config.yaml line 2: not valid YAML")):
        (tmp_path / "config.yaml").write_text(torn)
        step = int(complete(tmp_path)[-1].name.removeprefix("step-")) + 1
        ended = run_ranks(1, pretrain, [*argv, f"train.steps={step}"])
        assert f"note: {tmp_path}/{said}" in ended.out[0]
        assert "it will be rewritten" in ended.out[0]
        assert "changed since" not in ended.out[0]
        assert (tmp_path / "config.yaml").read_text().count("\n") == whole.count("\n")
