"""One optimizer step, and what came of it. The caller decides what follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalite.checkpoint.save import Saver
from megalite.checkpoint.state import State
from megalite.config import Resolved
from megalite.config.batch import batch_size, is_skipped
from megalite.data.dataset import Samples
from megalite.engine.batches import Microbatch, load_microbatches
from megalite.engine.engine import Engine
from megalite.launch.stop import Stop
from megalite.optim.adamw import clip_scale
from megalite.optim.loss_scale import exhausted, next_scale
from megalite.optim.lr import learning_rate
from megalite.parallel.groups import sum_numbers
from megalite.run.objective import Objective


@dataclass(frozen=True)
class Outcome:
    """What came of one step; the same on every rank, except `microbatches` and the wording of `stop`.

    samples: numbers of the samples of the global batch. microbatches: this rank's part of it, none if
    train.skip_samples passes over the batch. figures: the objective's, `loss` among them; none if no token is trained.
    grad_norm: of the mean loss, before clipping. lr, loss_scale: those of this step.

    skipped: why the step updated no weight, "" if it did. diverged: why training cannot continue, "" if it can; weights
    and counters are then those before the step. stop: why the run has to stop after this step, or "". saves: the sums
    of `Saver.progress`, for `Saver.settle`.
    """

    samples: range
    microbatches: Sequence[Microbatch]
    figures: Mapping[str, float]
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: str
    diverged: str
    stop: str
    saves: tuple[float, float]

    @property
    def loss(self) -> float | None:
        """The mean loss over the batch, None if no token of it is trained."""
        return self.figures.get("loss")


def train_step(
    engine: Engine, objective: Objective, dataset: Samples, state: State, stop: Stop, saver: Saver
) -> Outcome:
    """Train on the next global batch of `dataset` and advance `state`. Collective.

    Loss, gradient norm, stop signals and the progress of a pending save are summed over all ranks in one small
    collective, so that every rank decides alike. Raises TrainingError for a token that the model does not have.
    """
    c = engine.config
    rate = learning_rate(c.optim, state.consumed_samples)
    samples = range(
        state.consumed_samples, state.consumed_samples + batch_size(c.train, c.parallel.dp, state.consumed_samples)
    )
    microbatches: list[Microbatch] = []
    sums, squares = dict.fromkeys(engine.sums, 0.0), 0.0
    if not is_skipped(c.train, samples):
        microbatches = load_microbatches(dataset, samples, c, engine.mesh)
        sums = engine.forward_backward(microbatches, state.loss_scale)
        squares = engine.gradient_squares()
    over, failed = saver.progress()
    flags = {"squares": squares, "stops": float(stop.asked()), "saves over": over, "saves failed": failed}
    assert not flags.keys() & sums.keys()
    total = sum_numbers(engine.mesh.world, {**sums, **flags}, engine.mesh.device)
    tokens, used_scale = total["tokens"], state.loss_scale
    figures = objective.figures({name: total[name] for name in sums}) if tokens else {}
    # every rank has the same sum of squares, so all of them skip a step or none does
    norm, factor = clip_scale(c.optim, total["squares"], tokens, used_scale)
    outcome = Outcome(
        samples=samples,
        microbatches=microbatches,
        figures=figures,
        grad_norm=norm,
        lr=rate,
        loss_scale=used_scale,
        skipped=_why_skipped(bool(microbatches), tokens, norm, used_scale),
        diverged=_why_diverged(c, state, figures.get("loss"), norm, rate),
        stop=(stop.reason or "another rank received a stop signal") if total["stops"] else "",
        saves=(total["saves over"], total["saves failed"]),
    )
    if outcome.diverged:
        return outcome
    if tokens:
        state.loss_scale, state.scale_steps = next_scale(c, used_scale, state.scale_steps, math.isfinite(norm))
    if not outcome.skipped:
        engine.update(rate, factor)
    state.skipped_steps += bool(outcome.skipped)
    state.step += 1
    state.consumed_samples += len(samples)
    return outcome


def _why_skipped(loaded: bool, tokens: float, norm: float, loss_scale: float) -> str:
    if not loaded:
        return "passed over: no update"
    if not tokens:
        # weight decay alone would shrink the weights
        return "no token of this batch is trained: no update"
    return "" if math.isfinite(norm) else f"skipped: gradients overflow at scale {loss_scale:g}"


def _why_diverged(c: Resolved, state: State, loss: float | None, norm: float, rate: float) -> str:
    fp16, finite = c.train.dtype == "fp16", math.isfinite(norm)
    if (loss is None or math.isfinite(loss)) and (finite or fp16):
        # fp16 gradients may overflow, as long as the loss scale can be lowered
        return "" if finite else exhausted(c, state.loss_scale)
    return (
        f"step {state.step + 1}: loss {loss}, gradient norm {norm}: training has diverged; the weights of the last "
        f"checkpoint are untouched. Lower optim.lr (now {rate:.2e}) or lengthen optim.warmup_samples"
    )
