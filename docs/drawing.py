"""Colours and shapes of the diagrams in docs/."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

RANKS = ("#5b8fd0", "#e6a03c")
WHOLE, NONE, INK, SOFT = "#d9dbe0", "#f6f6f3", "#2b2b2b", "#77777a"
FORWARD, BACKWARD, COLLECTIVE = "#5b8fd0", "#7cb86a", "#c8553d"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one axes, in tenths of an inch from the upper left corner; `width`, `height` in inches."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(10 * height, 0))
    axes.set_axis_off()
    return figure, axes


def box(axes: Axes, x: float, y: float, w: float, h: float, colour: str, dashed: bool = False) -> None:
    edge, style = (SOFT, (0, (2, 2))) if dashed else (INK, "-")
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=edge, linewidth=0.8, linestyle=style))


def text(axes: Axes, x: float, y: float, words: str, size: float = 8.5, colour: str = INK, **more: Any) -> None:
    axes.text(x, y, words, fontsize=size, color=colour, **({"ha": "center", "va": "center"} | more))


def arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float, colour: str = INK) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 8}
    axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)


def pill(
    axes: Axes, x: float, y: float, w: float, h: float, words: str, size: float = 8.5, rotation: str = "horizontal"
) -> None:
    """A rounded box with white text, centred at (x, y): a collective."""
    style = "round,pad=0,rounding_size=0.9"
    axes.add_patch(
        FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=style, facecolor=COLLECTIVE, edgecolor="none", zorder=4)
    )
    text(axes, x, y, words, size, "white", rotation=rotation, weight="bold", zorder=5)
