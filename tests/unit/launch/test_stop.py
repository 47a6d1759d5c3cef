"""Signals, the STOP file and the time limit ask for a stop; afterwards signals are whose they were."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.launch.stop import SIGNALS, Stop


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[Stop]:
    stop = Stop(tmp_path, 0.0, True)
    yield stop
    stop.close()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_wish(stop: Stop, number: signal.Signals) -> None:
    assert not stop.asked()
    os.kill(os.getpid(), number)
    assert stop.asked()
    assert stop.reason == number.name


def test_the_first_reason_stays(stop: Stop, tmp_path: Path) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    (tmp_path / "STOP").touch()
    assert stop.asked()
    assert stop.reason == "SIGUSR1"


def test_stop_file(stop: Stop, tmp_path: Path) -> None:
    assert not stop.asked()
    (tmp_path / "STOP").touch()
    assert stop.asked()
    assert stop.reason == "STOP file"


def test_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = Stop(tmp_path, 10.0, True)
    try:
        now[0] = 59.9
        assert not stop.asked()
        now[0] = 60.1
        assert stop.asked()
        assert stop.reason == "train.time_limit_s"
    finally:
        stop.close()


def test_a_rank_that_does_not_watch_hears_signals_alone(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    stop = Stop(tmp_path, 1e-9, False)
    try:
        assert not stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked()
    finally:
        stop.close()


def test_close_gives_the_signals_back(tmp_path: Path) -> None:
    heard: list[int] = []
    before = {number: signal.signal(number, lambda n, frame: heard.append(n)) for number in SIGNALS}
    try:
        stop = Stop(tmp_path, 0.0, True)
        stop.close()
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        assert heard == list(SIGNALS)
        assert not stop.asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal\n"
        "from megalite.launch.stop import Stop\n"
        "stop = Stop(pathlib.Path('.'), 0.0, False)\n"
        "for _ in range(2): os.kill(os.getpid(), signal.SIGINT); print(stop.asked(), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "True\n", "")


def test_a_hangup_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As under nohup; else it asks for a save."""
    script = (
        "import os, pathlib, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == 'nohup' else signal.SIG_DFL)\n"
        "from megalite.launch.stop import Stop\n"
        "stop = Stop(pathlib.Path('.'), 0.0, False)\n"
        "os.kill(os.getpid(), signal.SIGHUP); print(stop.asked(), stop.reason)\n"
    )
    for word, printed in (("nohup", "False \n"), ("terminal", "True SIGHUP\n")):
        done = subprocess.run(
            [sys.executable, "-c", script, word], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert (done.stdout, done.stderr) == (printed, "")


def test_a_signal_prints_advice_if_a_step_is_longer_than_torchrun_waits(
    stop: Stop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    stop.step_s = 45.0
    assert stop.advice() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop.step_s = 29.0
    assert stop.advice() == ""
    stop.step_s = 45.0
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked()
    assert capfd.readouterr().err == (
        "SIGTERM: saving at the end of this step; a step takes 45 s and torchrun kills its ranks 30 s after a signal: "
        "start it with --shutdown_timeout 150\n"
    )
