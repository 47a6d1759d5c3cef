"""A live line on a terminal, plain lines in a log."""

import io
import os
import shutil
import sys
import time
from collections.abc import Callable

import pytest

from megalite.watch.progress import Bar, Progress, duration, fit

ERASE = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Makes the output a terminal; called within the test, as pytest sets the output anew before it."""

    def _terminal() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
        return stream

    return _terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (245, "4m05s"),
        (3599, "59m59s"),
        (3599.7, "1h00m"),
        (2 * 3600 + 3 * 60, "2h03m"),
        (86399, "23h59m"),
        (3 * 86400 + 4 * 3600, "3d04h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_log_gets_a_line_every_interval_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True, 12, 5)
    for step in range(1, 13):
        progress.step(step, float(step), ["lr 1"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert [line.split("  eta")[0] for line in out.splitlines()] == [
        # the mean of the steps since the line before
        "step  5/12  loss 3.0000  lr 1",
        "step 10/12  loss 8.0000  lr 1",
        "step 12/12  loss 11.5000  lr 1",
    ]


def test_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True, 100, 1)
    clock[0] += 60  # what came before the first step is not the steps' doing
    for step in (41, 42, 43):  # resumed
        progress.step(step, 3.0, [])
        clock[0] += 2
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["step", "41/100", "loss", "3.0000"],
        ["step", "42/100", "loss", "3.0000", "eta", "1m56s"],
        ["step", "43/100", "loss", "3.0000", "eta", "1m54s"],
    ]


def test_a_terminal_has_a_live_line_between(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    progress = Progress(True, 20, 10)
    progress.step(1, 3.0, [])
    assert screen.getvalue() == f"{ERASE}step  1/20  loss 3.0000"
    progress.step(2, 2.0, ["x" * 100])
    live = screen.getvalue().split(ERASE)[-1]
    assert live == "step  2/20  loss 2.0000  eta 0s"  # this step's loss, and what does not fit is left out


def test_the_live_line_fits_with_its_eta() -> None:
    fields = ["loss 10.1234", "grad norm 123.456", "lr 3.00e-04", "1,234,567 tokens/s", "mfu 41.3%"]
    for width in range(1, 140):
        line = fit("step 123456/500000", fields, "eta 12d03h", width)
        assert len(line) <= width
        assert line.endswith("eta 12d03h") == (width >= 30)
    assert fit("step 123456/500000", fields, "eta 12d03h", 79) == (
        "step 123456/500000  loss 10.1234  grad norm 123.456  lr 3.00e-04  eta 12d03h"
    )


def test_what_stays_replaces_the_live_line(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    progress = Progress(True, 20, 10)
    progress.step(9, 3.0, [])
    progress.say("saved")
    progress.say("twice")
    progress.step(10, 2.0, [])
    assert screen.getvalue().split("  eta")[0] == (
        f"{ERASE}step  9/20  loss 3.0000{ERASE}saved\ntwice\nstep 10/20  loss 2.5000"
    )


def test_one_rank_prints(terminal: Callable[[], Terminal]) -> None:
    screen = terminal()
    progress = Progress(False, 20, 1)
    progress.step(1, 3.0, [])
    progress.say("saved")
    assert screen.getvalue() == ""


# a bar


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], io.StringIO]:
    def _errors(live: bool) -> io.StringIO:
        stream = Terminal() if live else io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
        return stream

    return _errors


def test_a_bar_on_a_terminal(errors: Callable[[bool], io.StringIO], clock: list[float]) -> None:
    screen = errors(True)
    with Bar("preprocessing", 1000) as bar:
        bar.advance(1)  # sooner than the eye can follow
        assert screen.getvalue() == ""
        clock[0] += 10
        bar.advance(249, "12 documents", "x" * 60)
        assert screen.getvalue() == f"{ERASE}preprocessing [#####...............]  25%  12 documents  eta 30s"
        assert len(screen.getvalue()) < 80 + len(ERASE)
        clock[0] += 10
        bar.advance(2000)  # more than the total
        assert screen.getvalue().split(ERASE)[-1] == "preprocessing [####################] 100%  eta 0s"
    assert screen.getvalue().endswith(ERASE)


def test_a_bar_in_a_log(errors: Callable[[bool], io.StringIO], clock: list[float]) -> None:
    log = errors(False)
    with Bar("converting", 100) as bar:
        for _ in range(100):
            clock[0] += 0.7
            bar.advance(1, "embed.weight")
    assert log.getvalue().splitlines() == [
        "converting  43%  embed.weight  eta 40s",
        "converting  86%  embed.weight  eta 10s",
    ]


def test_a_bar_of_unknown_length_or_of_another_rank(errors: Callable[[bool], io.StringIO], clock: list[float]) -> None:
    log = errors(False)
    with Bar("preprocessing", None) as bar:
        clock[0] += 31
        bar.advance(5, "5 documents")
    assert log.getvalue() == "preprocessing  5 documents\n"
    with Bar("preprocessing", 7, shows=False) as bar:
        clock[0] += 31
        bar.advance(5, "5 documents")
    assert log.getvalue() == "preprocessing  5 documents\n"
    with Bar("nothing", 0) as bar:
        bar.show()
    assert log.getvalue().endswith("nothing\n")
