"""Draw a simulated plan: as text for a terminal, or as a picture."""

from __future__ import annotations

import math
from pathlib import Path

from megalite.pipeline.simulate import COMPUTE, Event, Simulation

COLOURS = {"F": "#5b8fd0", "B": "#7cb86a", "I": "#7cb86a", "W": "#e6b450"}
ANSI = {"F": "\x1b[30;44m", "B": "\x1b[30;42m", "I": "\x1b[30;42m", "W": "\x1b[30;43m"}
IDLE = "#ebebe6"
LEGEND = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def text_grid(played: Simulation, width: int | None = None, colour: bool = False) -> str:
    """One row per rank, one column per unit of time: `F3` a forward, `B3---` a longer backward, `.` idle.

    A rank's second stage has an apostrophe, `F3'`, its third two. The unit divides all times or, if that is far too
    fine, is the shortest action; times are then rounded. Rows of more than `width` characters continue in further
    blocks below. `colour` adds ANSI colours.
    """
    events = _computations(played)
    unit = _unit(events)
    digits = len(str(max((event.action.microbatch for event in events), default=0)))
    chunks = _chunks(played)
    cell = digits + 2 + max(chunks.values(), default=0)
    columns = _column(played.makespan, unit)
    rows = [["." + " " * (cell - 1)] * columns for _ in played.timelines]
    for event in events:
        start, end = _column(event.start, unit), _column(event.end, unit)
        name = f"{event.action.op}{event.action.microbatch}" + "'" * chunks[event.action.stage]
        # of a length of one unit there is nothing to draw out
        text = name.ljust((end - start) * cell - 1, "-" if end - start > 1 else " ") + " "
        for column in range(start, end):
            part = text[(column - start) * cell :][:cell]
            if colour:
                shown = part.rstrip()
                part = f"{ANSI[event.action.op]}{shown}\x1b[0m{' ' * (cell - len(shown))}"
            rows[event.rank][column] = part
    margin = len(f"rank {len(rows) - 1}  ")
    per_block = max(1, columns if width is None else (width - margin) // cell)
    blocks = []
    for first in range(0, columns, per_block):
        last = min(first + per_block, columns)
        ticks = [f"{column * unit:g}".ljust(5 * cell) for column in range(first, last, 5)]
        lines = ["time".ljust(margin) + "".join(ticks)]
        lines += [f"rank {rank}".ljust(margin) + "".join(row[first:last]) for rank, row in enumerate(rows)]
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def save_png(played: Simulation, path: str | Path, title: str) -> None:
    """Draw the plan with matplotlib: one row per rank, time to the right, the microbatch in every box
    and the peak of live activations behind every row; a rank's later stages are paler.

    The suffix of `path` selects the format (png, svg, pdf). Raises ModuleNotFoundError with the remedy if
    matplotlib is missing, OSError if `path` cannot be written, ValueError for a suffix that matplotlib does
    not support.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ModuleNotFoundError as error:
        remedy = "a picture needs matplotlib, which is not installed: pip install megalite[plot]"
        raise ModuleNotFoundError(remedy) from error
    events, ranks, chunks = _computations(played), len(played.timelines), _chunks(played)
    shortest = min((event.end - event.start for event in events), default=1)
    inches = min(max(6.5, 0.3 * played.makespan / shortest), 40)
    points = 72 * (inches - 1) * shortest / max(played.makespan, shortest)
    figure = Figure(figsize=(inches, 1.5 + 0.42 * ranks), layout="constrained")
    axes = figure.add_subplot()
    axes.add_patch(Rectangle((0, -0.5), played.makespan, ranks, facecolor=IDLE, linewidth=0))
    for event in events:
        action, length = event.action, event.end - event.start
        edge = 0.8 if points > 6 else 0.2
        corner = (event.start, event.rank - 0.42)
        colour = (COLOURS[action.op], 1 - 0.6 * chunks[action.stage] / (1 + max(chunks.values())))
        box = Rectangle(corner, length, 0.84, facecolor=colour, edgecolor="white", linewidth=edge)
        axes.add_patch(box)
        if points * length / shortest > 7:
            middle, size = event.start + length / 2, min(9, points * 0.6 + 2)
            axes.text(middle, event.rank, str(action.microbatch), ha="center", va="center", fontsize=size)
    axes.set(xlim=(0, max(played.makespan, shortest)), ylim=(ranks - 0.5, -0.5), xlabel="time")
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.tick_params(length=0, axis="y")
    for rank, peak in enumerate(played.peak_live):
        frame = axes.get_yaxis_transform()  # x in parts of the axes, y in ranks
        axes.text(1.0, rank, f"  peak {peak}", transform=frame, va="center")
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10.5)
    shown = [op for op in COMPUTE if any(event.action.op == op for event in events)]
    handles = [Patch(color=COLOURS[op], label=LEGEND[op]) for op in shown]
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _computations(played: Simulation) -> list[Event]:
    return [event for event in played.events if event.action.op in COMPUTE and event.end > event.start]


def _chunks(played: Simulation) -> dict[int, int]:
    """The chunk that each stage is: how many earlier stages its rank holds."""
    stages = [sorted({event.action.stage for event in timeline}) for timeline in played.timelines]
    return {stage: chunk for own in stages for chunk, stage in enumerate(own)}


def _unit(events: list[Event]) -> float:
    times = [time for event in events for time in (event.start, event.end)]
    shortest = min((event.end - event.start for event in events), default=1.0)
    divisor = math.gcd(*map(int, times)) if all(time == int(time) for time in times) else 0
    if 4 * divisor >= shortest:
        return divisor
    # Costs may differ by any factor, but a terminal has its limits.
    return max(shortest, max(times, default=0) / 10_000)


def _column(time: float, unit: float) -> int:
    # Rounded half up, so that a span of at least one unit always keeps at least one column.
    return math.floor(time / unit + 0.5)
