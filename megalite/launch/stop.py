"""Requests to stop a run early: a signal, a STOP file in the run folder, or the time limit.

Any rank may receive a signal; one rank watches the clock and the file. The trainer sums the requests over all ranks, so
that all stop after the same step.

SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask for a save at the end of the current step; a second SIGINT exits at once. SLURM
sends SIGUSR1 or SIGTERM before a job's time limit, a closing terminal sends SIGHUP; the STOP file is for launchers that
do not forward signals.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from megalite.launch import launcher

# under nohup a run outlives its terminal
NOHUP = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *(() if NOHUP else (signal.SIGHUP,)))
# torchrun's default --shutdown_timeout: it kills its ranks this long after a signal
TORCHRUN_S = 30.0


class Stop:
    """This rank's request to stop. Installs signal handlers until `close`.

    `watches`: whether this rank watches the STOP file and the time limit (0: no limit). The caller keeps `step_s`, the
    seconds per step, up to date.
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
            # not print: the handler may have interrupted one
            os.write(2, f"{self.reason}: saving at the end of this step; {advice}\n".encode())

    def advice(self) -> str:
        """Which flag torchrun needs if it would kill its ranks before a step ends; "" if it would not."""
        if self.step_s < TORCHRUN_S or "TORCHELASTIC_RUN_ID" not in os.environ:
            return ""
        return (
            f"a step takes {self.step_s:.0f} s and torchrun kills its ranks {TORCHRUN_S:.0f} s after a signal: start "
            f"it with --shutdown_timeout {self.step_s * 2 + 60:.0f}"
        )

    def heard(self) -> bool:
        """Whether a signal has arrived or the launcher has died since this object was made."""
        if not self.reason and launcher.launcher_gone():
            self.reason = "the launcher is gone"
        return bool(self.reason)

    def asked(self) -> bool:
        """Whether this rank wants to stop, for any reason; `reason` names it."""
        self.heard()
        if not self.reason and self._file is not None and self._file.exists():
            self.reason = "STOP file"
        if not self.reason and self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "train.time_limit_s"
        return bool(self.reason)

    def close(self) -> None:
        """Restore the previous signal handlers."""
        launcher.training = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
