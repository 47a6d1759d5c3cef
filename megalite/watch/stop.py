"""When to end early: a signal, a STOP file in the run folder, or the time limit. Every rank asks; the answer is shared.

Any rank may hear a signal. The clock and the file are watched by one, which can then say which of them it was.

SIGINT, SIGTERM and SIGUSR1 ask for a save at the end of the step under way; a second SIGINT ends at once. SLURM sends
SIGUSR1 or SIGTERM before a job's time is over; the STOP file is for launchers that do not pass signals on.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from megalite import place

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """`asked()` is this rank's own wish; the trainer sums it over all ranks, so that all stop at one step."""

    def __init__(self, run_dir: Path, time_limit_s: float, watches: bool = True) -> None:
        self.reason = ""
        self._file = run_dir / "STOP" if watches else None
        self._deadline = time.monotonic() + time_limit_s if time_limit_s and watches else None
        place.training = True
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            # a second Ctrl-C: the user does not want to wait for the save
            os._exit(130)
        self.reason = self.reason or signal.Signals(number).name

    def heard(self) -> bool:
        """Whether a signal has come or the launcher is gone, at any time since this was made."""
        if not self.reason and place.launcher_gone():
            self.reason = "the launcher is gone"
        return bool(self.reason)

    def asked(self) -> bool:
        self.heard()
        if not self.reason and self._file is not None and self._file.exists():
            self.reason = "STOP file"
        if not self.reason and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "train.time_limit_s"
        return bool(self.reason)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        place.training = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
