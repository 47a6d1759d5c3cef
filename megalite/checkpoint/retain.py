"""Which checkpoints of a run go and which stay. No torch here."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megalite.checkpoint.folder import BUILDING, step_of


def surplus(folders: Sequence[Path], keep: int, keep_every: int = 0) -> list[Path]:
    """Of a run's checkpoints, oldest first, those that go: all but the newest `keep` (0: none go).

    Those whose step is a multiple of `keep_every` (0: none) stay too, and links, whose checkpoint lies elsewhere.
    """
    older = list(folders[:-keep]) if keep else []
    return [old for old in older if not old.is_symlink() and (not keep_every or step_of(old) % keep_every)]


def remove(folder: Path, between: Callable[[], None] = lambda: None) -> None:
    """Remove a checkpoint; its name goes first, for what has lost some of its files must not look like one.

    `between` is called when the name is gone and the files are not. Nothing to do where someone else has removed it.
    """
    hidden = folder.with_name(f"{BUILDING}pruned-{folder.name}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(hidden)
        between()
        shutil.rmtree(hidden)
