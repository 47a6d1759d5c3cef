"""The held-out losses of a run: measured, reported, and compared with the best so far."""

from __future__ import annotations

import math
from typing import Any

from megalite.checkpoint.state import State
from megalite.config.errors import TrainingError
from megalite.data.dataset import Spread
from megalite.data.sets import DataSets
from megalite.engine.engine import Engine
from megalite.engine.heldout import held_out
from megalite.run.objective import Objective, described
from megalite.watch.metrics import Metrics
from megalite.watch.progress import Progress


def evaluate(
    engine: Engine, objective: Objective, data: DataSets, state: State, metrics: Metrics, progress: Progress
) -> dict[str, float]:
    """Measure every held-out set and report the objective's figures of it: {name: mean loss}. Collective.

    Also reports bits per byte where the text of a set is known. `state` keeps the best mean loss over the sets, and
    counts the evaluations since. Raises TrainingError if no token of a set is trained.
    """
    losses: dict[str, float] = {}
    for name, samples in data.heldout.items():
        count = min(len(samples), engine.config.train.eval_samples or len(samples))
        sums = held_out(engine, Spread(samples, count), f"held out {name}", progress.speaks)
        if not sums["tokens"]:
            raise TrainingError(f"held-out set {name}: no token of the {count} samples looked at is trained")
        figures = objective.figures(sums)
        losses[name] = figures["loss"]
        row: dict[str, Any] = {"step": state.step, "name": name, **figures, "tokens": int(sums["tokens"])}
        text = ", ".join([f"held out {name}: {losses[name]:.4f} nats/token", *described(figures)])
        if per_token := data.bytes_per_token[name]:
            row["bits_per_byte"] = losses[name] / math.log(2) / per_token
            text += f", {row['bits_per_byte']:.4f} bits/byte"
        metrics.write("eval", **row)
        if not math.isfinite(losses[name]):
            text = f"WARNING: held out {name}: the loss is {losses[name]}; these weights are of no use for it"
        progress.say(f"step {state.step:>{len(str(progress.steps))}}/{progress.steps}  {text}")
    if losses:
        mean = sum(losses.values()) / len(losses)
        better = math.isfinite(mean) and (state.best_loss is None or mean < state.best_loss)
        state.evals_without_gain = 0 if better else state.evals_without_gain + 1
        state.best_loss = mean if better else state.best_loss
    return losses
