"""This process and whoever started it: the line left for torchrun, and how it ends with its launcher or at once."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from megalite.launch.place import place


def tell_launcher(line: str, env: Mapping[str, str] = os.environ) -> None:
    """Leave the line that this rank ends with where torchrun looks for it, so that its report closes with that line."""
    path = env.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):  # the line is on the screen all the same
            Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")


_launcher = 0
# whether a training loop runs, which looks for the launcher at each step and saves where it is gone
training = False


def watch_launcher(env: Mapping[str, str] = os.environ) -> None:
    """Remember who started this rank, and outside the training loop end with it, in whatever call this rank waits.

    A process alone has no launcher: it may outlive the shell it was typed into.
    """
    global _launcher
    if "TORCHELASTIC_RUN_ID" in env or place(env).world_size > 1:
        _launcher = -1 if _adopted_by_init() else os.getppid()
        threading.Thread(target=_end_without_launcher, name="launcher", daemon=True).start()


def _adopted_by_init() -> bool:
    # in a container the launcher itself may be process 1
    try:
        return os.getppid() == 1 and "python" not in Path("/proc/1/exe").resolve().name
    except OSError:
        return False


def launcher_gone() -> bool:
    """Whether this rank's launcher is dead, so that nobody would end this rank if it waited for ever."""
    return _launcher != 0 and os.getppid() != _launcher


def _end_without_launcher() -> None:
    while training or not launcher_gone():
        time.sleep(0.5)
    end(1)


# the thread that writes a checkpoint, and how long an end waits for it
SAVER, SAVER_S = "checkpoint", 10.0
# the file of the run folder that says that this process has it
held: Path | None = None
ending = False


def end(status: int) -> NoReturn:
    """End this process at once, from any thread, but for a checkpoint that is nearly written; give its folder back."""
    global ending
    ending = True
    for thread in threading.enumerate():
        if thread.name == SAVER:
            thread.join(SAVER_S)
    if held is not None:
        with contextlib.suppress(OSError):
            held.unlink()
    os._exit(status)
