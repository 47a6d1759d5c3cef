"""Fault injection for tests: MEGALITE_FAULT=point:rank:n kills a rank when it reaches a point for the n-th time."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import BinaryIO

# in the order in which a save passes them; up to save.after_part on every rank, after that on rank 0 only
POINTS = (
    "save.before_folder",
    "save.after_folder",
    "save.before_block",
    "save.in_block",
    "save.before_fsync",
    "save.after_fsync",
    "save.before_part",
    "save.after_part",
    "save.before_manifest",
    "save.in_manifest",
    "save.before_manifest_fsync",
    "save.after_manifest",
    "save.before_rename",
    "save.after_rename",
    "save.before_pointer",
    "save.in_pointer",
    "save.before_prune",
    "save.in_prune",
    "save.after_prune",
)


class Faults:
    """Kills this process (SIGKILL) at a point of a save.

    `order`: "point:rank:n", "" for never; None: the environment's MEGALITE_FAULT. Raises ValueError, listing the
    points, if it is neither.
    """

    def __init__(self, rank: int, order: str | None = None) -> None:
        order = os.environ.get("MEGALITE_FAULT", "") if order is None else order
        self._count: Counter[str] = Counter()
        self._point, self._nth = "", 0
        if order:
            point, _, rest = order.partition(":")
            numbers = rest.split(":")
            if point not in POINTS or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
                raise ValueError(f"MEGALITE_FAULT={order} is not POINT:RANK:N; the points are {', '.join(POINTS)}")
            if int(numbers[0]) == rank:
                self._point, self._nth = point, int(numbers[1])

    def at(self, point: str, file: BinaryIO | None = None) -> None:
        """Die here if ordered to. `file` is flushed first, so that everything written so far reaches the disk."""
        assert point in POINTS, point
        if point != self._point:
            return
        self._count[point] += 1
        if self._count[point] == self._nth:
            if file is not None:
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
