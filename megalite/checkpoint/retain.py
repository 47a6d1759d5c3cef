"""Which checkpoints of a run go and which stay. No torch here."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint.folder import BUILDING, STEP


def surplus(folders: Sequence[Path], keep: int, keep_every: int = 0) -> list[Path]:
    """Of a run's checkpoints, oldest first, those that go: all but the newest `keep` (0: none go).

    Those whose step is a multiple of `keep_every` (0: none) stay too, and links, whose checkpoint lies elsewhere.
    """
    older = list(folders[:-keep]) if keep else []
    return [old for old in older if not old.is_symlink() and (not keep_every or _step(old) % keep_every)]


def remove(folder: Path) -> None:
    """Remove a checkpoint; its name goes first, for what has lost some of its files must not look like one."""
    hidden = folder.with_name(f"{BUILDING}pruned-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _step(folder: Path) -> int:
    match = STEP.fullmatch(folder.name)
    assert match, folder
    return int(match[1])
