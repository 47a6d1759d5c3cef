"""Which checkpoints of a run to remove, and how. No torch here."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megalite.checkpoint.folder import BUILDING, step_of


def surplus(folders: Sequence[Path], keep: int, keep_every: int = 0) -> list[Path]:
    """The checkpoints to remove, of a run's `folders`, oldest first: all but the newest `keep` (0: none is removed).

    Those whose step is a multiple of `keep_every` (0: no step) are kept too, and so are symbolic links.
    """
    older = list(folders[:-keep]) if keep else []
    return [old for old in older if not old.is_symlink() and (not keep_every or step_of(old) % keep_every)]


def remove(folder: Path, between: Callable[[], None] = lambda: None) -> None:
    """Remove a checkpoint, if it still exists. It is hidden first, so that an incomplete one is never found.

    `between` is called after the rename and before the files are deleted.
    """
    hidden = folder.with_name(f"{BUILDING}pruned-{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(hidden)
        between()
        shutil.rmtree(hidden)
