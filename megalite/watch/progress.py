"""Progress display: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence


def duration(seconds: float) -> str:
    """A duration as text: 59s, 4m05s, 2h03m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def fit(head: str, fields: Sequence[str], tail: str, width: int) -> str:
    """Join head, as many fields as fit into `width` columns, and tail."""
    for count in range(len(fields), -1, -1):
        line = "  ".join(filter(None, (head, *fields[:count], tail)))
        if len(line) <= width:
            return line
    return head[:width]


def _loss(loss: float | None) -> list[str]:
    return [] if loss is None else [f"loss {loss:.4f}"]


def _put(text: str) -> None:
    """Write to standard output; if it is closed, as after a lost terminal, the run continues silently."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Progress:
    """The progress of a run of `steps` steps, printed by the one rank that `speaks`, every `interval` steps."""

    def __init__(self, speaks: bool, steps: int, interval: int) -> None:
        self.speaks, self.steps, self.interval = speaks, steps, interval
        self._live = speaks and sys.stdout.isatty()
        self._drawn = False
        self._start = time.monotonic()
        self._first: int | None = None
        self._losses: list[float] = []

    def say(self, text: str) -> None:
        """Print a permanent line."""
        if self.speaks:
            self._erase()
            # text and newline in one write, because ranks share the pipe
            _put(text + "\n")

    def step(self, step: int, loss: float | None, fields: Sequence[str]) -> None:
        """Report that `step` steps are done: every interval on a permanent line, in between on the live line.

        A permanent line shows the mean loss since the previous one, the live line this step's `loss` (None: no trained
        token).
        """
        if not self.speaks:
            return
        if self._first is None:
            self._first, self._start = step, time.monotonic()
        self._losses += [] if loss is None else [loss]
        each = (time.monotonic() - self._start) / max(1, step - self._first)
        eta = f"eta {duration(each * (self.steps - step))}" if step > self._first else ""
        head = f"step {step:>{len(str(self.steps))}}/{self.steps}"
        if step % self.interval == 0 or step == self.steps:
            loss = sum(self._losses) / len(self._losses) if self._losses else None
            self._losses.clear()
            self.say("  ".join(filter(None, (head, *_loss(loss), *fields, eta))))
        elif self._live:
            width = shutil.get_terminal_size().columns - 1
            _put("\r\x1b[K" + fit(head, [*_loss(loss), *fields], eta, width))
            self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            _put("\r\x1b[K")
            self._drawn = False


class Bar:
    """Progress towards `total`, on stderr: a bar with percentage and time left on a terminal, else a line every 30 s.

    `total` None: the amount is unknown. `shows`: whether this process prints.
    """

    REDRAW_S, LOG_S, WIDTH = 0.1, 30.0, 20

    def __init__(self, what: str, total: int | None, shows: bool = True) -> None:
        self.what, self.total, self.shows, self.done = what, total, shows, 0
        self.live = shows and sys.stderr.isatty()
        self._start = self._printed = time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def advance(self, by: int = 1, *fields: str) -> None:
        """Add `by` to the amount done; `fields` are details to show, the most important first."""
        self.done += by
        now = time.monotonic()
        if self.shows and now - self._printed >= (self.REDRAW_S if self.live else self.LOG_S):
            self._printed = now
            self.show(*fields)

    def show(self, *fields: str) -> None:
        """Print the progress now."""
        share = min(1.0, self.done / self.total) if self.total else 0.0
        head, eta = self.what, ""
        if self.total:
            filled = int(share * self.WIDTH)
            bar = f" [{'#' * filled}{'.' * (self.WIDTH - filled)}]" if self.live else ""
            head = f"{self.what}{bar} {share:4.0%}"
            eta = f"eta {duration((time.monotonic() - self._start) * (1 / share - 1))}" if share else ""
        if self.live:
            sys.stderr.write("\r\x1b[K" + fit(head, fields, eta, shutil.get_terminal_size().columns - 1))
        else:
            sys.stderr.write("  ".join(filter(None, (head, *fields, eta))) + "\n")
        sys.stderr.flush()
