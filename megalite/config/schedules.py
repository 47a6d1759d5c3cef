"""The table of pipeline schedules: one row a schedule, with what it asks of chunks and of the backward pass.

The lists of actions are in `megalite/pipeline/schedule.py`, by the same names; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import NamedTuple


class Schedule(NamedTuple):
    """A row. `names`: what others call it, for messages."""

    names: tuple[str, ...] = ()
    chunked: bool = False
    """Needs at least two chunks a rank, and a multiple of as many microbatches as there are ranks; else one chunk."""
    splits: bool = False
    """Whether it divides a backward into input gradient and weight gradient."""


SCHEDULES: Mapping[str, Schedule] = {
    "1f1b": Schedule(("one_f_one_b", "pipedream_flush", "pipedream")),
    "gpipe": Schedule(("afab", "fill_drain")),
    "interleaved": Schedule(("interleaved_1f1b", "interleaved1f1b", "virtual", "vpp"), chunked=True),
    "zb-h1": Schedule(("zbh1", "zb_h1", "zb1p", "zero_bubble", "zerobubble"), splits=True),
}
"""The schedules one can train with, by the name a user writes."""


def nearest(name: str) -> str | None:
    """The schedule a user may have meant by an unknown `name`; None if nothing is near."""
    known = {alias: key for key, row in SCHEDULES.items() for alias in (key, *row.names)}
    near = get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.6) or get_close_matches(
        name.lower(), known, n=1, cutoff=0.4
    )
    return known[near[0]] if near else None
