"""What a schedule keeps and how long it idles at any size, without playing all of it.

After the first few microbatches each further group of p does what the one before did: it takes as long, and adds as
much to the peak (nothing, or under GPipe its activations). So a long run follows from two short ones. In a pipeline of
more than `MOST` ranks, `MOST` ranks stand for all: peaks grow in proportion, and are then up to one part in `MOST`
too high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from megalite.pipeline.schedule import make_plan
from megalite.pipeline.simulate import live_counts, simulate

MOST = 64
Counts = list[list[tuple[tuple[int, ...], tuple[int, ...]]]]


def peak_bytes(
    schedule: str, ranks: int, microbatches: int, chunks: int, whole: Sequence[int], kept: Sequence[int]
) -> list[int]:
    """Most bytes of activations that each pipeline rank keeps at one time.

    whole, kept: bytes of one microbatch on each stage; whole between its F and B (or I), kept between its I and W.
    """
    few = min(ranks, MOST)
    scale = ranks / few

    def at(number: int) -> list[int]:
        counts = _counts(schedule, few, number, chunks)
        return [
            max(
                sum(math.ceil(n * scale) * whole[stage] for n, stage in zip(running, range(rank, len(whole), ranks)))
                + sum(math.ceil(n * scale) * kept[stage] for n, stage in zip(waiting, range(rank, len(kept), ranks)))
                for running, waiting in counts[rank * few // ranks]
            )
            for rank in range(ranks)
        ]

    number = math.ceil(microbatches / scale)
    short, long = _runs(few, number)
    if long == number:
        return at(long)
    steps = (number - long) / (long - short)
    return [b + round((b - a) * steps) for a, b in zip(at(short), at(long))]


def bubble(schedule: str, ranks: int, microbatches: int, chunks: int) -> float:
    """Share of time in which the ranks idle, with stages of equal cost and a backward twice as long as a forward."""
    few = min(ranks, MOST)
    _, number = _runs(few, math.ceil(microbatches * few / ranks))
    share, makespan = _played(schedule, few, number, chunks)
    # a rank idles while the pipeline fills and drains, for a time that each rank before or after it adds to
    idle = share * makespan * (ranks - 1) / max(1, few - 1)
    return idle / (idle + (1 - share) * makespan * microbatches / number)


def _runs(ranks: int, microbatches: int) -> tuple[int, int]:
    """Two numbers of microbatches that both reach the steady state; or `microbatches` itself, twice, if it is small."""
    return (2 * ranks, 3 * ranks) if microbatches > 3 * ranks else (microbatches, microbatches)


@lru_cache(maxsize=512)
def _counts(schedule: str, ranks: int, microbatches: int, chunks: int) -> Counts:
    return [live_counts(actions) for actions in make_plan(schedule, ranks, microbatches, chunks)]


@lru_cache(maxsize=512)
def _played(schedule: str, ranks: int, microbatches: int, chunks: int) -> tuple[float, float]:
    played = simulate(make_plan(schedule, ranks, microbatches, chunks))
    return played.bubble, played.makespan
