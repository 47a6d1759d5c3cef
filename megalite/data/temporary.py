"""Temporary files, `NAME.tmp-PID`, are locked while their writer is alive, so that leftovers can be recognised."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO


class Locks:
    """Opens temporary files for writing, locked until `close` or the end of this process."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def open(self, path: Path) -> BinaryIO:
        """Create and lock a file."""
        file = path.open("wb")
        with contextlib.suppress(OSError):  # a file system without locks, on which leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists():
            file.close()
            return self.open(path)  # another process removed it as a leftover before it was locked
        # a duplicate keeps the lock when the file is closed, as it still has its temporary name then
        self._descriptors.append(os.dup(file.fileno()))
        return file

    def close(self) -> None:
        """Release all locks."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def remove_leftovers(final: Sequence[Path]) -> None:
    """Remove temporary files of `final` whose lock is free, because their writer is dead."""
    for path in final:
        for left in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
            with contextlib.suppress(OSError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
