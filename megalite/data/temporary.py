"""Files under temporary names, `NAME.tmp-PID`, are locked while their writer lives; so those of the dead are known."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO


class Locks:
    """Opens temporary files for writing, each locked until `close`, or until this process ends."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def open(self, path: Path) -> BinaryIO:
        file = path.open("wb")
        with contextlib.suppress(OSError):  # a file system without locks: there leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists():
            file.close()
            return self.open(path)  # taken for a dead writer's before it was locked
        # the lock stays when the file is closed, for its name is still a temporary one then
        self._descriptors.append(os.dup(file.fileno()))
        return file

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def remove_leftovers(final: Sequence[Path]) -> None:
    """Remove the temporary files that dead writers of `final` have left: nobody holds their locks."""
    for path in final:
        for left in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
            with contextlib.suppress(OSError), left.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
