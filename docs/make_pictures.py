"""Make the pictures of docs/: `python docs/make_pictures.py [NAME ...]` writes docs/img/NAME.png.

Diagrams are drawn here, pipeline-parallel.png from a simulated schedule; numbers.png is measured by training.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

from drawing import BACKWARD, COLLECTIVE, FORWARD, INK, NONE, RANKS, SOFT, WHOLE, arrow, box, canvas, pill, text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from measured import numbers

from megalite.pipeline.schedule import make_plan
from megalite.pipeline.simulate import Simulation, simulate

IMAGES = Path(__file__).parent / "img"


def tensor_parallel() -> Figure:
    """One feed-forward on two ranks: which part of every tensor is where."""
    figure, axes = canvas(9.0, 4.05)
    text(axes, 28, 2.6, "column parallel: gate_up (and qkv)", 9.5, weight="bold")
    text(axes, 56, 2.6, "row parallel: down (and out)", 9.5, weight="bold")
    for rank, colour in enumerate(RANKS):
        top = 6 + rank * 16
        middle = top + 5
        text(axes, 2.4, middle, f"rank {rank}", 9.5, colour, weight="bold", rotation="vertical")
        box(axes, 6, top, 8, 10, WHOLE)
        text(axes, 10, middle, "X")
        text(axes, 10, top + 11.3, "[s, h] whole", 7.5, SOFT)
        text(axes, 16.2, middle, "×", 12)
        for part in range(2):
            here = part == rank
            box(axes, 18.5 + 5 * part, top + 1, 5, 8, colour if here else NONE, not here)
            text(axes, 21 + 5 * part, middle, f"A{'₀₁'[part]}", colour=INK if here else SOFT)
        text(axes, 23.5, top + 11.3, f"{('first', 'second')[rank]} half of the columns", 7.5, SOFT)
        arrow(axes, 29.5, middle, 32.2, middle)
        text(axes, 30.8, middle - 1.8, "σ", 9)
        box(axes, 33, top, 5, 10, colour)
        text(axes, 35.5, middle, f"H{'₀₁'[rank]}")
        text(axes, 35.5, top + 11.3, "[s, f/2]", 7.5, SOFT)
        text(axes, 41, middle, "×", 12)
        for part in range(2):
            here = part == rank
            box(axes, 44, top + 5 * part, 8, 5, colour if here else NONE, not here)
            text(axes, 48, top + 2.5 + 5 * part, f"B{'₀₁'[part]}", colour=INK if here else SOFT)
        text(axes, 48, top + 11.3, f"{('first', 'second')[rank]} half of the rows", 7.5, SOFT)
        arrow(axes, 53.3, middle, 56.2, middle)
        box(axes, 57, top, 8, 10, "#dfe9f5" if rank == 0 else "#faecd6")
        text(axes, 61, middle, f"H{'₀₁'[rank]}B{'₀₁'[rank]}")
        text(axes, 61, top + 11.3, "[s, h] a summand", 7.5, SOFT)
        arrow(axes, 65.6, middle, 68.6, middle)
        arrow(axes, 73, middle, 76, middle)
        box(axes, 77, top, 8, 10, WHOLE)
        text(axes, 81, middle, "Y")
        text(axes, 81, top + 11.3, "[s, h] whole", 7.5, SOFT)
    pill(axes, 70.8, 19, 3.6, 26, "all-reduce", rotation="vertical")
    note = "Y = H₀B₀ + H₁B₁.   Forward: one all-reduce, of Y.   Backward: one all-reduce, of the gradient of X."
    text(axes, 45, 37.6, note, 9)
    return figure


def _state(axes: Axes, x: float, y: float, kind: str, size: float = 6.5) -> None:
    """A tensor [s, h] as a square, s downwards: who holds what."""
    half = size / 2
    if kind == "sequence":
        box(axes, x, y, size, half, RANKS[0])
        box(axes, x, y + half, size, half, RANKS[1])
    elif kind == "features":
        box(axes, x, y, half, size, RANKS[0])
        box(axes, x + half, y, half, size, RANKS[1])
    else:
        light = kind == "summands"
        for rank, shift in ((1, 1.1), (0, 0.0)):
            colour = ("#dfe9f5", "#faecd6")[rank] if light else RANKS[rank]
            box(axes, x + shift, y + shift, size, size, colour)


def sequence_parallel() -> Figure:
    """The attention half of a block: tp alone above, with sequence parallelism below."""
    figure, axes = canvas(9.0, 4.5)
    for left, right, colour, title in (
        (9.8, 28.2, "#eef4ea", "residual stream, norm"),
        (34.0, 66.2, "#f3f1ec", "heads cut over the ranks"),
        (71.9, 89.8, "#eef4ea", "residual stream, norm"),
    ):
        axes.add_patch(Rectangle((left, 1), right - left, 36, facecolor=colour, linewidth=0))
        text(axes, (left + right) / 2, 3, title, 9, weight="bold")
    for name, y, outside, before, after in (
        ("tp alone", 8.5, "whole", ("", "all-reduce"), ("all-\nreduce", "nothing")),
        ("tp with sp", 26, "sequence", ("all-\ngather", "reduce-\nscatter"), ("reduce-\nscatter", "all-gather")),
    ):
        middle = y + 3.6
        text(axes, 4.6, middle, name, 9.5, weight="bold")
        places = [(11.2, outside, "x"), (20.1, outside, "norm x"), (35.0, "whole", "norm x")]
        places += [(46.5, "features", "q k v, core"), (57.8, "summands", "out"), (72.9, outside, "out")]
        places += [(81.7, outside, "x + out")]
        for x, kind, label in places:
            _state(axes, x, y, kind)
            text(axes, x + 3.6, y + 9.3, label, 8, SOFT)
        for (x, kind, _), (to, _, _) in pairwise(places):
            arrow(axes, x + (7.9 if kind in ("whole", "summands") else 6.9), middle, to - 0.4, middle)
        for x, (forward, backward) in ((31.0, before), (68.9, after)):
            if forward:
                pill(axes, x, middle, 5.2, 5, forward, 6.8)
            text(axes, x, y + 8.7, f"backward:\n{backward}", 6.8, COLLECTIVE, va="top")
    legend = [
        (5.5, "sequence", "each rank half of the sequence"),
        (29.5, "features", "each rank half of the heads"),
        (51.5, "whole", "each rank all of it"),
        (68.3, "summands", "each rank a summand of all"),
    ]
    for x, kind, label in legend:
        _state(axes, x, 40.3, kind, 2.4)
        text(axes, x + 4.1, 41.7, label, 8, ha="left")
    return figure


def _live(played: Simulation, rank: int) -> tuple[list[float], list[int]]:
    """Activations that a rank holds, as steps over time."""
    changes = {0.0: 0, played.makespan: 0}
    for event in played.timelines[rank]:
        if event.action.op in "FB":
            time, change = (event.start, 1) if event.action.op == "F" else (event.end, -1)
            changes[time] = changes.get(time, 0) + change
    times = sorted(changes)
    return times, list(accumulate(changes[time] for time in times))


def pipeline_parallel() -> Figure:
    """GPipe and 1F1B at p = 4, m = 8, and what the first rank keeps alive under each."""
    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    upper, lower, live = figure.subplots(3, 1, sharex=True, height_ratios=(4, 4, 2.6))
    for axes, name, title in ((upper, "gpipe", "GPipe"), (lower, "1f1b", "1F1B")):
        played = simulate(make_plan(name, 4, 8))
        axes.add_patch(Rectangle((0, -0.5), played.makespan, 4, facecolor="#ebebe6", linewidth=0))
        for event in played.events:
            if event.action.op in "FB":
                colour = FORWARD if event.action.op == "F" else BACKWARD
                length, corner = event.end - event.start, (event.start, event.rank - 0.42)
                axes.add_patch(Rectangle(corner, length, 0.84, facecolor=colour, edgecolor="white", linewidth=0.8))
                text(axes, event.start + length / 2, event.rank, str(event.action.microbatch), 8)
        axes.set(xlim=(0, played.makespan), ylim=(3.5, -0.5))
        axes.set_yticks(range(4), [f"stage {rank}" for rank in range(4)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        heading = f"{title}: bubble {played.bubble:.1%}, live microbatches by stage {played.peak_live}"
        axes.set_title(heading, loc="left", fontsize=9.5)
        times, counts = _live(played, 0)
        style = {"color": COLLECTIVE if name == "gpipe" else INK, "linewidth": 1.6}
        live.step(times, counts, where="post", label=f"{title}: at most {max(counts)}", **style)
    live.set(ylim=(0, 9), xlabel="time (a forward is 1, a backward 2)", yticks=(0, 4, 8))
    live.set_title("microbatches whose activations stage 0 keeps", loc="left", fontsize=9.5)
    live.spines[["top", "right"]].set_visible(False)
    live.grid(axis="y", alpha=0.3)
    live.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, borderaxespad=0)
    return figure


def data_parallel() -> Figure:
    """Buckets leave while backward still computes: the last microbatch's backward, and the flat buffer below."""
    figure, axes = canvas(9.0, 3.9)
    blocks = ["head", "layer 3", "layer 2", "layer 1", "layer 0", "embed"]
    widths = [9, 11, 11, 11, 11, 9]
    starts = [13.0]
    for width in widths:
        starts.append(starts[-1] + width)
    text(axes, 11.5, 6.5, "backward of the\nlast microbatch", 8.5, ha="right")
    text(axes, 11.5, 14.5, "all-reduce\nover replicas", 8.5, ha="right")
    text(axes, 11.5, 28, "flat buffer", 8.5, ha="right")
    for name, start, width in zip(blocks, starts, widths):
        box(axes, start, 4.5, width, 4, "#cfe6c6")
        text(axes, start + width / 2, 6.5, name)
        axes.plot([start + width] * 2, [8.5, 26], color=SOFT, linewidth=0.5, linestyle=(0, (1, 3)))
    buckets = [(0, 2), (2, 4), (4, 6)]
    free = 0.0
    for number, (first, last) in enumerate(buckets):
        left, right = starts[first], starts[last]
        shade = ("#dbe7f5", "#c3d7ee", "#aac7e7")[number]
        box(axes, left, 26, right - left, 4, shade)
        begin = max(right, free)
        free = begin + (right - left) * 0.5
        pill(axes, (begin + free) / 2, 14.5, free - begin, 4, f"bucket {number}")
        arrow(axes, right, 8.9, right, 12.2)
        axes.plot([left + 0.2, right - 0.2], [31.3, 31.3], color=INK, linewidth=1)
        text(axes, (left + right) / 2, 33, f"bucket {number}", 8.5)
    for name, start, width in zip(blocks, starts, widths):
        text(axes, start + width / 2, 28, name, 8)
    end = starts[-1]
    axes.plot([end, end], [3, 20.3], color=INK, linewidth=1)
    text(axes, end - 0.8, 19.3, "backward ends", 8, ha="right")
    axes.annotate("", (free, 18.6), (end, 18.6), arrowprops={"arrowstyle": "<|-|>", "color": INK, "lw": 0.9})
    text(axes, end + 0.6, 20.4, "REDUCE waits\nonly for this", 8, ha="left", va="top")
    arrow(axes, 13, 36.2, end, 36.2)
    text(axes, 44, 37.6, "parameters in reverse order: the order in which backward reaches them", 8, SOFT)
    text(axes, 13, 2.3, "time →", 8, SOFT, ha="left")
    return figure


def design() -> Figure:
    """Three tables and one plain model meet in one place."""
    figure, axes = canvas(9.0, 3.5)

    def card(x: float, title: str, lines: str, where: str) -> None:
        style = "round,pad=0,rounding_size=1.0"
        axes.add_patch(FancyBboxPatch((x, 1.5), 20, 15.5, boxstyle=style, facecolor=NONE, edgecolor=SOFT, lw=0.8))
        text(axes, x + 10, 3.7, title, 9.5, weight="bold")
        axes.text(x + 1.2, 9.4, lines, fontsize=7.6, family="monospace", va="center", color=INK, linespacing=1.5)
        text(axes, x + 10, 15.3, where, 7.6, SOFT)
        arrow(axes, x + 10, 17.3, 45 + (x + 10 - 45) * 0.3, 21.6)

    card(
        1.5,
        "parameters",
        "attn.qkv    cut qkv\nattn.out    cut row\nmlp.gate_up cut column\nmlp.down    cut row",
        "config/parameters.py",
    )
    card(
        24,
        "stages",
        "llama3-8b on pp 4:\nlayers 0–7,   8–16,\n      17–25, 26–31",
        "plan/costs.py",
    )
    card(
        46.5,
        "schedule",
        "rank 0  F0 F1 B0 F2 B1 …\nrank 1  F0 B0 F1 B1 …\nlower adds SEND, RECV",
        "pipeline/schedule.py",
    )
    card(
        69,
        "the plain model",
        "x + attn(norm(x))\nx + mlp(norm(x))\nno rank, no group,\nno collective",
        "model/decoder.py",
    )
    style = "round,pad=0,rounding_size=1.0"
    axes.add_patch(FancyBboxPatch((27, 22), 36, 4.4, boxstyle=style, facecolor=RANKS[0], edgecolor="none"))
    text(axes, 45, 24.2, "engine.build(config, world): one rank", 9.5, "white", weight="bold")
    arrow(axes, 45, 26.8, 45, 29.6)
    text(axes, 45, 31.5, "trainer: forward_backward, one sum over ranks, clip, AdamW, save", 9)
    return figure


def house() -> Figure:
    """The floors of docs/design.md, which tests/unit/test_floors.py compares with the imports."""
    table = re.findall(
        r"^\| (\d) \| ([\w, ]+)", (IMAGES.parent / "design.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    figure, axes = canvas(9, 3.9)
    blue = ("engine", "pipeline", "parallel", "model")
    for row, (number, rooms) in enumerate(table):
        names, y = rooms.strip().split(", "), 3 + 5.4 * row
        text(axes, 3, y + 2, number, 11, SOFT, weight="bold")
        width = 82 / len(names)
        for column, name in enumerate(names):
            x = 6 + column * width
            box(axes, x + 0.4, y, width - 0.8, 4, RANKS[0] if name in blue else WHOLE)
            text(axes, x + width / 2, y + 2, name, 9, "white" if name in blue else INK)
    text(axes, 45, 36.6, "a folder imports folders of lower floors only; blue: what splits and runs a model", 8.5, SOFT)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "tensor-parallel": tensor_parallel,
    "sequence-parallel": sequence_parallel,
    "pipeline-parallel": pipeline_parallel,
    "data-parallel": data_parallel,
    "design": design,
    "house": house,
    "numbers": numbers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(PICTURES)} (default: all)")
    names = parser.parse_args().names or list(PICTURES)
    if unknown := [name for name in names if name not in PICTURES]:
        sys.exit(f"error: unknown picture {unknown[0]!r}; use {', '.join(PICTURES)}")
    IMAGES.mkdir(exist_ok=True)
    for name in names:
        PICTURES[name]().savefig(IMAGES / f"{name}.png", dpi=150, facecolor="white")
        print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()
