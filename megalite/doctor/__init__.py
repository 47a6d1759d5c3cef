"""Checks what megalite needs on this machine and how to fix each gap: `python -m megalite.doctor [--json]`.

A probe imports more than the standard library only where it needs it: the report must work on a broken installation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30


@dataclass
class Finding:
    """One line of the report. A `remedy` marks a gap; training cannot run with a gap that is `required`."""

    name: str
    value: str
    remedy: str = ""
    required: bool = False

    @property
    def state(self) -> str:
        """ok, note, or missing."""
        return "ok" if not self.remedy else "missing" if self.required else "note"


Findings = Iterator[Finding]


def one_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
