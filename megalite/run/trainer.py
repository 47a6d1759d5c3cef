"""One loop for every kind of training: what differs is the data and the configuration, never the loop."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megalite.checkpoint import folder as folders
from megalite.checkpoint.publish import remove_leftovers
from megalite.checkpoint.state import State
from megalite.config import Resolved
from megalite.config.errors import TrainingError
from megalite.data.sets import DataSets
from megalite.engine.engine import Engine, build
from megalite.engine.restore import first_state, first_values
from megalite.exchange.hf_keys import keep_hf
from megalite.launch.stop import Stop
from megalite.model.decoder import Decoder
from megalite.parallel.groups import World, sum_numbers
from megalite.plan.counts import run_flops
from megalite.run import meter as flops
from megalite.run.divergence import Spikes, advice, locate, spike_warning
from megalite.run.evaluation import evaluate
from megalite.run.objective import Objective, described
from megalite.run.run_folder import ask_requeue, fill_run_folder, remake_run_folder
from megalite.run.saving import Saving
from megalite.run.step import Outcome, train_step
from megalite.watch import disk
from megalite.watch.metrics import Metrics
from megalite.watch.plot import plot_losses
from megalite.watch.progress import Progress
from megalite.watch.trace import traced


@dataclass
class Run:
    """One rank's run: the engine, and what watches it.

    `failure`: what the disk refused, if that is to end the run.
    """

    config: Resolved
    objective: Objective
    engine: Engine
    data: DataSets
    state: State
    metrics: Metrics
    meter: flops.Meter
    progress: Progress
    stop: Stop
    saving: Saving
    failure: str = ""
    spikes: Spikes = field(default_factory=Spikes)


def train(
    config: Resolved,
    objective: Objective,
    data: DataSets,
    world: World,
    resume: Path | None,
    decoder: type[Decoder] = Decoder,
) -> State:
    """Train on a resolved, checked configuration until its last step or a stop; under train.eval_only only evaluate.

    data: what the objective opened. resume: the checkpoint to resume from, the same on every rank. decoder: the class
    of the model. Raises TrainingError if training diverges or the user has to change something, and SaveFailed if a
    checkpoint cannot be written.
    """
    stop = Stop(Path(config.train.run_dir), config.train.time_limit_s, world.rank == 0)
    try:
        engine = build(config, world, first_values(config), objective.head, decoder)
        run = _start(config, objective, data, engine, resume, stop)
    except BaseException:
        stop.close()
        raise
    try:
        if sum_numbers(run.engine.mesh.world, {"stops": float(stop.heard())}, world.device)["stops"]:
            return _stopped_before(run)
        if run.state.step == 0 or config.train.eval_only:
            _evaluate(run)
        while not config.train.eval_only and run.state.step < config.train.steps:
            with traced(_trace_path(run)):
                stopped = reason = _step(run)
            if _due(run, config.train.eval_interval):
                _evaluate(run)
                reason = reason or _no_gain(run)
            if _due(run, config.checkpoint.interval) or reason:
                run.saving.save(last=bool(reason) or run.state.step == config.train.steps)
            if reason and run.state.step < config.train.steps:
                run.progress.say(f"stopped at step {run.state.step}: {reason}; run the same command to resume")
                if note := run.stop.advice():
                    run.progress.say(f"note: {note}")
                if stopped:
                    _ask_requeue(run, stopped)
                break
        _finish(run)
    finally:
        run.saving.saver.close()
        run.stop.close()
        run.metrics.close()
    return run.state


def _start(
    config: Resolved, objective: Objective, data: DataSets, engine: Engine, resume: Path | None, stop: Stop
) -> Run:
    world, run_dir = engine.mesh.link, Path(config.train.run_dir)
    first = world.rank == 0
    progress = Progress(first, config.train.steps, config.log.interval)
    source, state = first_state(engine, data.fingerprint, resume, progress.say)
    if first:
        begun = resume or (folders.find(config.checkpoint.load) if config.checkpoint.load else None)
        run_dir.mkdir(parents=True, exist_ok=True)
        keep_hf(config, begun, run_dir)
        for damaged in folders.after(source) if resume is not None and source is not None else []:
            progress.say(f"set aside {folders.set_aside(damaged)}")
        for name in ("STOP", "REQUEUE"):
            (run_dir / name).unlink(missing_ok=True)
        remove_leftovers(run_dir)
        fill_run_folder(run_dir, config, data.template, state.step)
    metrics = Metrics(run_dir if first else None, tensorboard=config.log.tensorboard, step=state.step)
    metrics.write("start", at_step=state.step, world_size=world.size, resumed=str(source or ""))
    meter = flops.Meter(run_flops(config), world.size, world.device, config.train.dtype)
    saving = Saving(engine, state, run_dir, metrics, progress)
    return Run(config, objective, engine, data, state, metrics, meter, progress, stop, saving)


def _stopped_before(run: Run) -> State:
    """End a run that received a stop signal while it started: it takes no step, and has nothing to save."""
    reason = run.stop.reason or "another rank received a stop signal"
    run.progress.say(f"stopped before step {run.state.step + 1}: {reason}; run the same command to resume")
    _ask_requeue(run, reason)
    run.engine.mesh.world.barrier()
    return run.state


def _step(run: Run) -> str:
    """Take one optimizer step and report it; returns why the run has to stop after it, or ""."""
    began = time.monotonic()
    outcome = train_step(run.engine, run.objective, run.data.train, run.state, run.stop, run.saving.saver)
    if outcome.diverged:
        _raise_diverged(run, outcome)
    _report(run, outcome, time.monotonic() - began)
    run.saving.settle(*outcome.saves)
    return outcome.stop


def _raise_diverged(run: Run, outcome: Outcome) -> NoReturn:
    """Find what was not finite first, and raise TrainingError with it. Collective."""
    # every rank takes this path, so waiting for the pending save is safe
    run.saving.finish()
    finite = outcome.loss is None or math.isfinite(outcome.loss)
    where = locate(run.engine, outcome.microbatches, run.data.train, finite)
    text = f"{outcome.diverged}. First not finite: {where}; {advice(run.config, outcome.samples, run.data.train)}"
    run.metrics.write("diverged", step=run.state.step + 1, error=text)
    raise TrainingError(text)


def _report(run: Run, outcome: Outcome, seconds: float) -> None:
    """Write and show the figures of a step."""
    c, step, samples, loss = run.config, run.state.step, outcome.samples, outcome.loss
    if not outcome.microbatches:
        run.progress.say(f"step {step}: train.skip_samples passes over samples {samples.start} to {samples[-1]}")
    speed = len(samples) * c.train.seq_len / seconds
    run.stop.step_s = seconds
    usage = run.meter.read(speed)
    norm = math.inf if outcome.skipped else outcome.grad_norm
    spike = run.spikes.ratio(loss) if loss is not None else 0.0
    if loss is not None and run.spikes.begins(spike):
        run.progress.say(spike_warning(c, step, samples, run.data.train, loss, spike, norm))
    row = {"step": step, **outcome.figures, "lr": outcome.lr}
    row |= {"skipped": 1} if outcome.skipped else {"grad_norm": norm}
    row |= {"loss_scale": outcome.loss_scale} if c.train.dtype == "fp16" else {}
    row |= {"tokens_per_s": speed} | ({"loss_spike": spike} if spike else {})
    run.metrics.write("train", **row, samples=run.state.consumed_samples, **usage)
    _report_disk(run)
    fields = [outcome.skipped or f"grad norm {norm:.3f}", f"lr {outcome.lr:.2e}", f"{speed:,.0f} tokens/s"]
    fields += [] if outcome.skipped else [flops.describe(usage)]
    run.progress.step(step, loss, [*described(outcome.figures), *fields])


def _evaluate(run: Run) -> None:
    evaluate(run.engine, run.objective, run.data, run.state, run.metrics, run.progress)


def _due(run: Run, interval: int) -> bool:
    return run.state.step == run.config.train.steps or (interval > 0 and run.state.step % interval == 0)


def _trace_path(run: Run) -> Path | None:
    """Where the trace of the next step is written, if log.trace_step is that step."""
    asked = run.config.log.trace_step == run.state.step + 1
    return Path(run.config.train.run_dir) / f"trace-rank-{run.engine.mesh.world.rank:05d}.json" if asked else None


def _no_gain(run: Run) -> str:
    patience = run.config.train.patience
    if patience and run.state.evals_without_gain >= patience and run.state.step < run.config.train.steps:
        return f"{patience} evaluations without a better held-out loss than {run.state.best_loss:.4f}"
    return ""


def _ask_requeue(run: Run, reason: str) -> None:
    if run.engine.mesh.world.rank == 0 and not run.failure:
        ask_requeue(Path(run.config.train.run_dir), run.state.step, reason)


def _report_disk(run: Run) -> None:
    """Report writes that the disk refused, and create the run folder again if it was removed.

    Under checkpoint.on_failure=stop the run then saves at the end of its next step, and ends in this error.
    """
    c, run_dir = run.config, Path(run.config.train.run_dir)
    for text, may_end in run.metrics.problems():
        if run.metrics.folder_gone:
            try:
                remake_run_folder(run_dir, c, run.data.template, run.state.step)
                run.metrics.reopen()
            except (ValueError, OSError) as error:
                raise TrainingError(f"{text}: {error}") from None
            text += "; it is made again, without its older checkpoints and metrics"
        if may_end and c.checkpoint.on_failure == "stop":
            run.failure = run.failure or text
            run.stop.reason = run.stop.reason or text
        else:
            run.progress.say(f"WARNING: {text}")


def _finish(run: Run) -> None:
    c = run.config
    run_dir = Path(c.train.run_dir)
    run.metrics.write("end", at_step=run.state.step)
    _report_disk(run)
    if run.engine.mesh.world.rank == 0 and c.log.plot and not c.train.eval_only:
        try:
            picture = plot_losses(run_dir)
            run.progress.say(f"plot {picture}" if picture else "no plot: pip install 'megalite[plot]'")
        except OSError as error:
            run.progress.say(f"WARNING: no plot: {disk.reason(error, run_dir / 'loss.png')}. {disk.remedy(error)}")
    run.engine.mesh.world.barrier()
    if run.failure:
        raise TrainingError(run.failure)
