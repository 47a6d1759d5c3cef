"""One loop for every kind of training: what differs is the data and the configuration, never the loop."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint import folder as folders
from megalite.checkpoint.publish import remove_leftovers
from megalite.checkpoint.save import SaveFailed, Saver
from megalite.checkpoint.state import State
from megalite.config import Resolved
from megalite.config.batch import batch_size, is_skipped
from megalite.config.errors import TrainingError
from megalite.data.dataset import Spread
from megalite.data.sets import DataSets
from megalite.engine.batches import Microbatch, load_microbatches
from megalite.engine.engine import Engine, build
from megalite.engine.restore import first_state, first_values
from megalite.exchange.hf_keys import keep_hf
from megalite.launch.stop import Stop
from megalite.optim.adamw import clip_scale
from megalite.optim.loss_scale import next_scale
from megalite.optim.lr import learning_rate
from megalite.parallel.groups import World
from megalite.plan.counts import run_flops
from megalite.run import meter as flops
from megalite.run.divergence import Spikes, advice, locate, spike_warning
from megalite.run.run_folder import ask_requeue, fill_run_folder, remake_run_folder
from megalite.watch import disk
from megalite.watch.metrics import Metrics
from megalite.watch.plot import plot_losses
from megalite.watch.progress import Bar, Progress
from megalite.watch.trace import traced

# of one pipeline run of an evaluation: enough to fill any pipeline, few enough to hold
EVAL_MICROBATCHES = 32


@dataclass
class Run:
    """One rank's run: the engine and all that watches it."""

    config: Resolved
    engine: Engine
    data: DataSets
    state: State
    metrics: Metrics
    meter: flops.Meter
    progress: Progress
    stop: Stop
    saver: Saver
    saved_step: int = -1
    failure: str = ""
    spikes: Spikes = field(default_factory=Spikes)


def train(config: Resolved, data: DataSets, world: World, resume: Path | None) -> State:
    """Train (or with train.eval_only evaluate) a resolved, checked configuration to its end or until it is stopped.

    `resume`: the checkpoint to go on from, the same on every rank. Raises TrainingError where a loss is not finite.
    """
    stop = Stop(Path(config.train.run_dir), config.train.time_limit_s, world.rank == 0)
    try:
        run = _start(config, data, world, resume, stop)
    except BaseException:
        stop.close()
        raise
    try:
        if _sum(run.engine, float(stop.heard()))[0]:
            return _stopped_before(run)
        if run.state.step == 0 or config.train.eval_only:
            evaluate(run)
        while not config.train.eval_only and run.state.step < config.train.steps:
            with traced(_trace_path(run)):
                told = reason = train_step(run)
            if _due(run, config.train.eval_interval):
                evaluate(run)
                reason = reason or _no_gain(run)
            if _due(run, config.checkpoint.interval) or reason:
                save(run, last=bool(reason) or run.state.step == config.train.steps)
            if reason and run.state.step < config.train.steps:
                run.progress.say(f"stopped at step {run.state.step}: {reason}; the same command goes on from here")
                if advice := run.stop.advice():
                    run.progress.say(f"note: {advice}")
                if told:
                    _ask_requeue(run, told)
                break
        _finish(run)
    finally:
        run.saver.close()
        run.stop.close()
        run.metrics.close()
    return run.state


def _start(config: Resolved, data: DataSets, world: World, resume: Path | None, stop: Stop) -> Run:
    run_dir, first = Path(config.train.run_dir), world.rank == 0
    engine = build(config, world, first_values(config))
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
    return Run(config, engine, data, state, metrics, meter, progress, stop, Saver(run_dir, config, engine.mesh))


def _stopped_before(run: Run) -> State:
    """A stop that was asked for while the run started: no step is taken and nothing has to be saved."""
    reason = run.stop.reason or "another rank received a stop signal"
    run.progress.say(f"stopped before step {run.state.step + 1}: {reason}; the same command goes on from here")
    _ask_requeue(run, reason)
    run.engine.mesh.world.barrier()
    return run.state


def train_step(run: Run) -> str:
    """One optimizer step on the next global batch; gives the reason to stop after it, or ''."""
    began = time.monotonic()
    c, engine, state = run.config, run.engine, run.state
    rate = learning_rate(c.optim, state.consumed_samples)
    batch = batch_size(c.train, c.parallel.dp, state.consumed_samples)
    samples = range(state.consumed_samples, state.consumed_samples + batch)
    microbatches: list[Microbatch] = []
    loss_sum = tokens = squares = 0.0
    if not is_skipped(c.train, samples):
        microbatches = load_microbatches(run.data.train, samples, c, engine.mesh)
        loss_sum, tokens = engine.forward_backward(microbatches, state.loss_scale)
        squares = engine.gradient_squares()
    stop = run.stop.asked()
    sums = _sum(engine, loss_sum, tokens, squares, float(stop), *run.saver.progress())
    loss_sum, tokens, squares, stops, saves_over, saves_failed = sums
    norm, scale = clip_scale(c.optim, squares, tokens, state.loss_scale)
    loss = loss_sum / tokens if tokens else 0.0
    # every rank has the same sum of squares, so all of them skip a step or none
    finite, loss_scale = math.isfinite(norm), state.loss_scale
    # a batch in which no token is trained teaches nothing, and weight decay alone would shrink the weights
    learns = finite and tokens > 0
    try:
        if not math.isfinite(loss) or not (finite or c.train.dtype == "fp16"):
            raise TrainingError(
                f"step {state.step + 1}: loss {loss}, gradient norm {norm}: training has diverged; the weights of the "
                f"last checkpoint are untouched. Lower optim.lr (now {rate:.2e}) or lengthen optim.warmup_samples"
            )
        if tokens:
            state.loss_scale, state.scale_steps = next_scale(c, loss_scale, state.scale_steps, finite)
    except TrainingError as error:
        # every rank takes this path, so waiting for the pending save is safe
        with _save_may_fail(run):
            _saved(run, run.saver.finish())
        where = locate(engine, microbatches, run.data.train, math.isfinite(loss))
        text = f"{error}. First not finite: {where}; {advice(c, samples, run.data.train)}"
        run.metrics.write("diverged", step=state.step + 1, error=text)
        raise TrainingError(text) from None
    if learns:
        engine.update(rate, scale)
    state.skipped_steps += not learns
    state.step += 1
    state.consumed_samples += batch
    why = "" if finite else f"skipped: gradients overflow at scale {loss_scale:g}"
    if not tokens:
        why = "no token of this batch is trained: no update"
    if not microbatches:
        why = "passed over: no update"
        run.progress.say(f"step {state.step}: train.skip_samples passes over samples {samples.start} to {samples[-1]}")
    figures = ({"loss": loss} if tokens else {}) | {"lr": rate} | ({"skipped": 1} if why else {"grad_norm": norm})
    figures |= {"loss_scale": loss_scale} if c.train.dtype == "fp16" else {}
    _report(run, samples, time.monotonic() - began, figures, why)
    with _save_may_fail(run):
        _saved(run, run.saver.settle(saves_over, saves_failed))
    return (run.stop.reason or "another rank received a stop signal") if stops else ""


def _report(run: Run, samples: range, seconds: float, figures: dict[str, float], why: str) -> None:
    """Write and show the figures of a step; `why` it changed no weight, where it did not."""
    c, state, loss, norm = run.config, run.state, figures.get("loss"), figures.get("grad_norm", math.inf)
    speed = len(samples) * c.train.seq_len / seconds
    run.stop.step_s = seconds
    usage = run.meter.read(speed)
    spike = run.spikes.ratio(loss) if loss is not None else 0.0
    if loss is not None and run.spikes.begins(spike):
        run.progress.say(spike_warning(c, state.step, samples, run.data.train, loss, spike, norm))
    row = {"step": state.step, **figures, "tokens_per_s": speed} | ({"loss_spike": spike} if spike else {})
    run.metrics.write("train", **row, samples=state.consumed_samples, **usage)
    _hear_disk(run)
    fields = [f"grad norm {norm:.3f}", f"lr {figures['lr']:.2e}", f"{speed:,.0f} tokens/s", flops.describe(usage)]
    run.progress.step(state.step, loss, [why, *fields[1:3]] if why else fields)


def evaluate(run: Run) -> dict[str, float]:
    """Mean nats per token of every held-out set, reported by name; also bits per byte where the text is known."""
    c, t = run.config, run.config.train
    losses: dict[str, float] = {}
    for name, windows in run.data.heldout.items():
        count = min(len(windows), t.eval_samples or len(windows))
        chosen = Spread(windows, count)
        chunk = EVAL_MICROBATCHES * t.micro_batch_size * run.engine.mesh.dp.size
        loss_sum = tokens = 0.0
        with Bar(f"held out {name}", count, shows=run.progress.speaks) as bar:
            for first in range(0, count, chunk):
                samples = range(first, min(first + chunk, count))
                microbatches = load_microbatches(chosen, samples, c, run.engine.mesh)
                sums = run.engine.evaluate(microbatches)
                loss_sum, tokens = loss_sum + sums[0], tokens + sums[1]
                bar.advance(len(samples))
        loss_sum, tokens = _sum(run.engine, loss_sum, tokens)
        if not tokens:
            raise TrainingError(f"held-out set {name}: no token of the {count} samples looked at is trained")
        losses[name] = loss_sum / tokens
        row: dict[str, Any] = {"step": run.state.step, "name": name, "loss": losses[name], "tokens": int(tokens)}
        text = f"held out {name}: {losses[name]:.4f} nats/token"
        per_token = run.data.bytes_per_token[name]
        if per_token:
            row["bits_per_byte"] = losses[name] / math.log(2) / per_token
            text += f", {row['bits_per_byte']:.4f} bits/byte"
        run.metrics.write("eval", **row)
        if not math.isfinite(losses[name]):
            text = f"WARNING: {text.split(': ')[0]}: the loss is {losses[name]}; these weights are of no use for it"
        run.progress.say(f"step {run.state.step:>{len(str(c.train.steps))}}/{c.train.steps}  {text}")
    if losses:
        mean = sum(losses.values()) / len(losses)
        better = math.isfinite(mean) and (run.state.best_loss is None or mean < run.state.best_loss)
        run.state.evals_without_gain = 0 if better else run.state.evals_without_gain + 1
        run.state.best_loss = mean if better else run.state.best_loss
    return losses


def save(run: Run, last: bool = True) -> None:
    """Begin to write a checkpoint of this step, once; `last`: and wait for its end, for the run leaves after it.

    SaveFailed where one, this or that before it, cannot be written; with checkpoint.on_failure=continue only the last.
    """
    with _save_may_fail(run):
        _saved(run, run.saver.finish())  # one at a time
    if run.saved_step != run.state.step:
        run.saved_step = run.state.step
        values = dataclasses.asdict(run.state)
        run.saver.start(run.engine.shards, run.engine.spans(), run.engine.state(), values)
    if last or not run.config.checkpoint.async_save:
        with _save_may_fail(run, last):
            _saved(run, run.saver.finish())


def _saved(run: Run, folder: Path | None) -> None:
    if folder is not None:
        run.metrics.write("checkpoint", step=folders.step_of(folder), folder=str(folder))
        run.progress.say(f"checkpoint {folder}")


@contextmanager
def _save_may_fail(run: Run, last: bool = False) -> Iterator[None]:
    """Where a save that has failed ends the run, or is told and left behind."""
    try:
        yield
    except SaveFailed as error:
        untouched = "those before it are untouched"
        if last or run.config.checkpoint.on_failure == "stop":
            way = "" if last else ", or set checkpoint.on_failure=continue to train on without it"
            raise SaveFailed(f"{error}; {untouched}. {error.remedy}{way}") from None
        run.metrics.write("checkpoint_failed", step=run.state.step, error=str(error))
        run.progress.say(f"WARNING: {error}; {untouched}, the next try is at the next interval")


def _sum(engine: Engine, *values: float) -> Sequence[float]:
    """Sum numbers over all ranks: the one small collective of a step, in float64."""
    return engine.mesh.world.all_reduce(torch.tensor(values, dtype=torch.float64, device=engine.mesh.device)).tolist()


def _due(run: Run, interval: int) -> bool:
    return run.state.step == run.config.train.steps or (interval > 0 and run.state.step % interval == 0)


def _trace_path(run: Run) -> Path | None:
    """Where the trace of the step to come goes, on the step whose trace is asked for."""
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


def _hear_disk(run: Run) -> None:
    """Tell of what the disk has refused, and of a run folder that is gone, which is made again.

    With checkpoint.on_failure=stop the run then saves at the end of the next step and ends in this error.
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
    _hear_disk(run)
    if run.engine.mesh.world.rank == 0 and c.log.plot and not c.train.eval_only:
        try:
            picture = plot_losses(run_dir)
            run.progress.say(f"plot {picture}" if picture else "no plot: pip install 'megalite[plot]'")
        except OSError as error:
            run.progress.say(f"WARNING: no plot: {disk.reason(error, run_dir / 'loss.png')}. {disk.remedy(error)}")
    run.engine.mesh.world.barrier()
    if run.failure:
        raise TrainingError(run.failure)
