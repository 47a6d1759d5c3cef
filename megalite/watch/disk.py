"""Files that are there whole or not at all, and what to do when a disk refuses one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL = "Make room on that disk"
_GONE = "That folder was removed, renamed or unmounted: bring it back, or take another train.run_dir"
_FORBIDDEN = "Change the owner or the permissions of that folder, or take another train.run_dir"
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "Your quota on that disk is used up: remove files of yours, or ask for more",
    errno.EFBIG: "The limit on the size of a file is reached: raise it (ulimit -f)",
    errno.EROFS: "The file system is mounted read-only: have it mounted for writing, or take another train.run_dir",
    errno.EIO: "The disk or its server reports a fault: look at dmesg, and have it checked",
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.ESTALE: _GONE,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
}


def remedy(error: OSError) -> str:
    """What the user can do about a write that has failed, as a sentence without its full stop."""
    return REMEDIES.get(error.errno or 0, "Have that disk checked, or take another train.run_dir")


def reason(error: OSError, path: Path | None = None) -> str:
    """What failed, with the file: `No space left on device (/runs/a/metrics.jsonl)`."""
    where = error.filename or path
    return f"{error.strerror or error}" + (f" ({where})" if where else "")


def write_whole_text(path: Path, text: str) -> None:
    """Write a file that has its old content or the new one at any time; OSError, which names it, leaves the old."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
