"""What this machine has of what megalite needs, and what to do about each gap: `python -m megalite.doctor [--json]`.

Probes import only the standard library until they ask for more: the report is for machines where something is amiss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30


@dataclass
class Finding:
    """One line of the report. What has a `remedy` is a gap; without what is `required` training cannot run."""

    name: str
    value: str
    remedy: str = ""
    required: bool = False

    @property
    def state(self) -> str:
        """ok, note, or missing."""
        return "ok" if not self.remedy else "missing" if self.required else "note"


Findings = Iterator[Finding]


def said(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
