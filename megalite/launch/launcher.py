"""This process and its launcher: the error file for torchrun, exiting when the launcher dies, and exiting at once."""

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
    """Write this rank's last line to torchrun's error file, so that torchrun's own report shows it."""
    path = env.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):  # the line has been printed anyway
            Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")


_launcher = 0
# whether a training loop is running: it checks for the launcher at each step, and saves if the launcher is gone
training = False


def watch_launcher(env: Mapping[str, str] = os.environ) -> None:
    """Remember the parent process, and exit when it dies, even from within a blocking call.

    The training loop is exempt: it saves first. A single process has no launcher and may outlive its shell.
    """
    global _launcher
    if "TORCHELASTIC_RUN_ID" in env or place(env).world_size > 1:
        _launcher = -1 if _adopted_by_init() else os.getppid()
        threading.Thread(target=_end_without_launcher, name="launcher", daemon=True).start()


def _adopted_by_init() -> bool:
    # in a container, process 1 may be the launcher itself
    try:
        return os.getppid() == 1 and "python" not in Path("/proc/1/exe").resolve().name
    except OSError:
        return False


def launcher_gone() -> bool:
    """Whether this rank's launcher has died, so that nothing would end a rank that hangs."""
    return _launcher != 0 and os.getppid() != _launcher


def _end_without_launcher() -> None:
    while training or not launcher_gone():
        time.sleep(0.5)
    end(1)


# name of the thread that writes a checkpoint, and how long `end` waits for it
SAVER, SAVER_S = "checkpoint", 10.0
# the lock file of the run folder that this process owns
held: Path | None = None
ending = False


def end(status: int) -> NoReturn:
    """Exit at once, from any thread; waits up to SAVER_S for a checkpoint being written and releases the run folder."""
    global ending
    ending = True
    for thread in threading.enumerate():
        if thread.name == SAVER:
            thread.join(SAVER_S)
    if held is not None:
        with contextlib.suppress(OSError):
            held.unlink()
    os._exit(status)
