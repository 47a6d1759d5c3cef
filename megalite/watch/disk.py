"""Atomic writing of small files, and the remedy for each kind of write error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL = "Free some space on that disk"
_GONE = "That folder was removed, renamed or unmounted: restore it, or set another train.run_dir"
_FORBIDDEN = "Change the owner or the permissions of that folder, or set another train.run_dir"
DEFAULT_REMEDY = "Have that disk checked, or set another train.run_dir"
REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "Your quota on that disk is used up: remove some of your files, or ask for more",
    errno.EFBIG: "The file size limit is reached: raise it (ulimit -f)",
    errno.EROFS: "The file system is mounted read-only: have it mounted for writing, or set another train.run_dir",
    errno.EIO: "The disk or its server reports a fault: see dmesg, and have it checked",
    errno.ENOENT: _GONE,
    errno.ENOTDIR: _GONE,
    errno.ESTALE: _GONE,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
}


def remedy(error: OSError) -> str:
    """What the user can do about a failed write: a sentence without its full stop."""
    return REMEDIES.get(error.errno or 0, DEFAULT_REMEDY)


def reason(error: OSError, path: Path | None = None) -> str:
    """The error and its file: `No space left on device (/runs/a/metrics.jsonl)`."""
    where = error.filename or path
    return f"{error.strerror or error}" + (f" ({where})" if where else "")


def write_whole_text(path: Path, text: str) -> None:
    """Replace a file's content atomically. Raises OSError, with the file's name, and then keeps the old content."""
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
