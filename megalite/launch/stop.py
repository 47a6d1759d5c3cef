"""When to end early: a signal, a STOP file in the run folder, or the time limit. Every rank asks; the answer is shared.

Any rank may hear a signal. The clock and the file are watched by one, which can then say which of them it was.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for a save at the end of the step under way; a second SIGINT ends at once. SLURM
sends SIGUSR1 or SIGTERM before a job's time is over, a terminal that is closed SIGHUP; the STOP file is for launchers
that do not pass signals on.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from megalite.launch import launcher

# nohup has a run live on without its terminal
NOHUP = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *(() if NOHUP else (signal.SIGHUP,)))
# after a signal torchrun waits so long, unless it was told otherwise, and then kills its ranks
TORCHRUN_S = 30.0


class Stop:
    """`asked()` is this rank's own wish; the trainer sums it over all ranks, so that all stop at one step.

    `step_s`: how long a step takes, as the caller knows it.
    """

    def __init__(self, run_dir: Path, time_limit_s: float, watches: bool = True) -> None:
        self.reason = ""
        self.step_s = 0.0
        self._file = run_dir / "STOP" if watches else None
        self._deadline = time.monotonic() + time_limit_s if time_limit_s and watches else None
        launcher.training = True
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            # a second Ctrl-C: the user does not want to wait for the save
            os._exit(130)
        self.reason = self.reason or signal.Signals(number).name
        if self._file is not None and (advice := self.advice()):
            # print may be at work in what was interrupted
            os.write(2, f"{self.reason}: saving at the end of this step; {advice}\n".encode())

    def advice(self) -> str:
        """What to start torchrun with, where it kills its ranks before a step is over; "" where it does not."""
        if self.step_s < TORCHRUN_S or "TORCHELASTIC_RUN_ID" not in os.environ:
            return ""
        return (
            f"a step takes {self.step_s:.0f} s and torchrun kills its ranks {TORCHRUN_S:.0f} s after a signal: start "
            f"it with --shutdown_timeout {self.step_s * 2 + 60:.0f}"
        )

    def heard(self) -> bool:
        """Whether a signal has come or the launcher is gone, at any time since this was made."""
        if not self.reason and launcher.launcher_gone():
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
        launcher.training = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
