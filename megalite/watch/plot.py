"""loss.png: the loss curve of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite.watch.metrics import read_metrics


def plot_losses(run_dir: Path, references: dict[str, float] | None = None) -> Path | None:
    """Draw run_dir/loss.png from metrics.jsonl: training loss, its running mean, held-out losses, learning rate.

    `references`: {name: nats per token}, drawn as horizontal lines. Returns the path, None without matplotlib.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    metrics = read_metrics(run_dir)
    rows = [row for row in metrics.get("train", []) if "loss" in row]  # batches without a trained token have none
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, _running_mean(losses), color="tab:blue", linewidth=1.8, label="training (mean of 10)")
    held_out: dict[str, list[dict[str, Any]]] = {}
    for row in metrics.get("eval", []):
        held_out.setdefault(row["name"], []).append(row)
    for number, (name, points) in enumerate(sorted(held_out.items()), start=1):
        axes.plot(
            [p["step"] for p in points],
            [p["loss"] for p in points],
            "o-",
            color=f"C{number}",
            label=f"held out: {name}",
        )
    low, high = axes.get_ylim()
    for name, value in (references or {}).items():
        # losses fall from upper left to lower right, which leaves the other two corners free
        above = value > (low + high) / 2
        axes.axhline(value, linestyle="--", linewidth=1, color="gray")
        style: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        style |= {"va": "bottom", "fontsize": 8}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        axes.annotate(name, (0.99 if above else 0.01, value), (0, 2), ha="right" if above else "left", **style)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_dir.name)
    axes.grid(alpha=0.25)
    # below the axes, where no curve crosses it
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=min(4, 1 + len(held_out)), frameon=False)
    if rows and "lr" in rows[0]:
        rate = axes.twinx()
        # behind the losses and their labels
        rate.set_zorder(axes.get_zorder() - 1)
        axes.patch.set_visible(False)
        rate.plot(steps, [row["lr"] for row in rows], color="black", alpha=0.25, linewidth=1)
        rate.set_ylabel("learning rate (thin line)")
        rate.set_ylim(bottom=0)
    path = run_dir / "loss.png"
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _running_mean(values: list[float], width: int = 10) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]
