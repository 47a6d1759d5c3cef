"""A live line on a terminal, plain lines in a log."""

from __future__ import annotations

import shutil
import sys
import time


def duration(seconds: float) -> str:
    """59s, 4m05s, 2h03m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


class Progress:
    """Speaks for one rank of the run; the others are silent."""

    def __init__(self, speaks: bool, steps: int, interval: int) -> None:
        self.speaks, self.steps, self.interval = speaks, steps, interval
        self._live = speaks and sys.stdout.isatty()
        self._drawn = False
        self._start = time.monotonic()
        self._first: int | None = None

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.speaks:
            self._erase()
            # text and newline in one write: ranks share the pipe
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def step(self, step: int, text: str) -> None:
        """Report that `step` steps are done: every interval as a line that stays, in between on the live line."""
        if not self.speaks:
            return
        if self._first is None:
            self._first, self._start = step, time.monotonic()
        each = (time.monotonic() - self._start) / max(1, step - self._first)
        eta = f"  eta {duration(each * (self.steps - step))}" if step > self._first else ""
        line = f"step {step:>{len(str(self.steps))}}/{self.steps}  {text}{eta}"
        if step % self.interval == 0 or step == self.steps:
            self.say(line)
        elif self._live:
            width = shutil.get_terminal_size().columns
            sys.stdout.write("\r\x1b[K" + line[: width - 1])
            sys.stdout.flush()
            self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            sys.stdout.write("\r\x1b[K")
            self._drawn = False
