"""One run at a time has a run folder; the dead have none, and of another machine nothing is guessed."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint import lock
from megalite.config import ConfigError

HERE = {"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "none"}


def says(run_dir: Path, **changes: Any) -> str:
    """What a start is told of a folder locked by this process, but for `changes`; "" if it gets it."""
    path = run_dir / lock.NAME
    path.unlink(missing_ok=True)
    lock.hold(run_dir)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    text = ""
    try:
        lock.hold(run_dir)
    except ConfigError as error:
        text = str(error)
    assert "\n" not in text
    if text:
        return text
    lock.release(run_dir)
    assert not path.exists()
    return ""


def test_a_running_process_has_its_folder(tmp_path: Path) -> None:
    text = says(tmp_path)
    assert f"{tmp_path} is in use by " in text
    assert f"(process {os.getpid()}, since 20" in text
    assert f"wait for it to end (`touch {tmp_path}/STOP` asks a run to), or use another folder" in text
    lock.release(tmp_path)


def test_the_dead_have_none(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = lock._start_of(child.pid)
    assert says(tmp_path, pid=child.pid, started=started)
    assert not says(tmp_path, pid=child.pid, started=started - 1)  # its number was given to another process
    child.kill()
    while lock._start_of(child.pid) != -1:  # ended, and not yet waited for
        time.sleep(0.01)
    assert not says(tmp_path, pid=child.pid, started=started)
    child.wait()
    assert not says(tmp_path, pid=child.pid, started=started)


def test_of_another_machine_nothing_is_guessed(tmp_path: Path) -> None:
    text = says(tmp_path, machine="elsewhere", host="node9", pid=4242)
    assert f"{tmp_path} is locked by " in text
    assert "on node9 (process 4242, since 20" in text
    assert "cannot be seen from " in text
    assert "it has written no metrics.jsonl" in text
    assert f"`ssh node9 ps -fp 4242`: if it is gone, delete {tmp_path}/LOCK and start again" in text
    (tmp_path / "metrics.jsonl").touch()
    os.utime(tmp_path / "metrics.jsonl", (time.time() - 3 * 3600,) * 2)
    text = says(tmp_path, machine="elsewhere", jobs=["SLURM job 41"])
    assert "metrics.jsonl was last written 3h00m ago" in text
    assert "`squeue -j 41`" in text


@pytest.mark.parametrize(
    ("env", "same"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "8"}, False),
        ({"TORCHELASTIC_RUN_ID": "nightly"}, True),
        ({"TORCHELASTIC_RUN_ID": "none"}, False),
        ({}, False),
    ],
)
def test_an_earlier_attempt_of_the_same_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str], same: bool
) -> None:
    for name in HERE:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    text = says(tmp_path, machine="elsewhere", jobs=["SLURM job 7", "torchrun nightly"])
    assert (text == "") == same


def test_a_job_that_has_a_live_process_here_is_not_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts in the shell of one allocation."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert ", SLURM job 7)" in says(tmp_path)
    lock.release(tmp_path)


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", '{"host": 1}', "[" * 100_000])
def test_a_lock_that_says_nothing_is_left_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / lock.NAME).write_text(text)
    with pytest.raises(
        ConfigError, match=r"LOCK does not name the run that uses the folder; if no run does, delete it"
    ):
        lock.hold(tmp_path)


def test_only_who_has_it_releases_it(tmp_path: Path) -> None:
    lock.release(tmp_path)
    lock.hold(tmp_path)
    path = tmp_path / lock.NAME
    theirs = json.dumps(json.loads(path.read_text()) | {"pid": 1})
    path.write_text(theirs)
    lock.release(tmp_path)
    assert path.read_text() == theirs


def test_a_file_system_without_links_and_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    assert says(tmp_path)
    assert not says(tmp_path, pid=2**22 + 1)
    assert os.listdir(tmp_path) == []


def race(run_dir: Path, at: float, results: Any) -> None:
    while time.monotonic() < at:
        pass
    try:
        lock.hold(run_dir)
        results.put("holds")
        time.sleep(60)
    except ConfigError as error:
        results.put(str(error))


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("number", range(3))
def test_of_many_starts_at_one_moment_one_holds(tmp_path: Path, number: int, stale: bool) -> None:
    """Also where all find the lock of a run that was killed."""
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    if stale:
        lock.hold(tmp_path)
        path = tmp_path / lock.NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | {"started": 1}))
    at = time.monotonic() + 1.0
    starts = [context.Process(target=race, args=(tmp_path, at, results)) for _ in range(6)]
    for start in starts:
        start.start()
    try:
        said = sorted(results.get(timeout=60) for _ in starts)
    finally:
        for start in starts:
            start.kill()
            start.join()
    assert said.count("holds") == 1, said
    assert all("is in use by" in text for text in said if text != "holds"), said
    lock.hold(tmp_path)  # all are dead
    lock.release(tmp_path)
