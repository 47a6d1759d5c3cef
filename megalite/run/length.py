"""How long a run is, and the learning-rate curve over that length: epochs as steps, and what a continued run keeps.

No torch here. `say` prints a line for the user.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from megalite.checkpoint.contents import is_adapter
from megalite.checkpoint.folder import find, read_manifest
from megalite.config import ConfigError, Request, Resolved, check, reopen, resolve
from megalite.config.batch import steps_for, total_samples
from megalite.config.resolved import ResolvedOptim
from megalite.config.schema import MOST_STEPS
from megalite.optim.lr import learning_rate
from megalite.run import Say
from megalite.run.resume import newest_readable

# the keys that make the learning-rate curve
CURVE = ("lr", "min_lr", "lr_schedule", "wsd_decay_fraction", "warmup_samples", "decay_samples")


@dataclass(frozen=True)
class Progress:
    """How far the run to continue has come, and its learning-rate curve; None if its manifest has none."""

    step: int
    samples: int
    optim: ResolvedOptim | None


def progress_of(config: Resolved) -> Progress | None:
    """The counters that this run starts from; None if it starts at zero.

    They are those of the run's own newest checkpoint, else those of checkpoint.load if checkpoint.load_optim is set.
    """
    run_dir, folder = Path(config.train.run_dir), None
    if run_dir.is_dir():
        folder = newest_readable(run_dir, lambda _: None)
    if folder is None and config.checkpoint.load is not None and config.checkpoint.load_optim:
        folder = find(config.checkpoint.load)
    if folder is None:
        return None
    manifest = read_manifest(folder)
    if config.tune.mode == "lora" and not is_adapter(manifest):
        return None
    saved = manifest["config"].get("optim", {})
    curve = {key: saved[key] for key in CURVE if key in saved}
    optim = ResolvedOptim(**curve) if curve.get("decay_samples") is not None else None
    return Progress(manifest["step"], manifest["consumed_samples"], optim)


def with_epochs(config: Resolved, request: Request, samples: int, world_size: int, say: Say) -> Resolved:
    """`config` with train.steps in place of train.epochs, if one epoch has `samples` samples.

    Raises ConfigError if these are too many steps.
    """
    epochs = config.train.epochs
    if epochs is None:
        return config
    done = progress_of(config)
    step, used = (0, 0) if done is None else (done.step, done.samples)
    steps = steps_for(config.train, config.parallel.dp, epochs * samples, step, used)
    if steps > MOST_STEPS:
        raise ConfigError(
            f"train.epochs={epochs:g} of {samples} samples are {steps} steps, more than {MOST_STEPS:g}; "
            f"lower train.epochs"
        )
    say(f"train.epochs={epochs:g} of {samples} samples: {steps} steps")
    total, warmup = int(epochs * samples), config.optim.warmup_samples
    if warmup > total:
        say(
            f"warning: the learning rate does not reach optim.lr={config.optim.lr:g}: optim.warmup_samples={warmup} is "
            f"more than the {total} samples of the run; set it to {total // 10}"
        )
    # the decay was computed from the preset's steps, unless it was asked for
    asked = config if request.config.optim.decay_samples is not None else reopen(config, "optim.decay_samples")
    train = dataclasses.replace(config.train, steps=steps, epochs=None)
    config = resolve(dataclasses.replace(asked, train=train), world_size)
    check(config, world_size)
    return config


def with_curve(config: Resolved, request: Request, say: Say) -> Resolved:
    """`config` with the learning-rate curve of a continued run: it ends where the run ends, or is the saved run's.

    Says from what to what the rate changes at this point. Raises ConfigError if the user has set a key to another value
    than the saved curve has, which optim.lr_on_resume=keep asks for.
    """
    done = progress_of(config)
    if done is None or done.optim is None or not 0 < done.step < config.train.steps:
        return config
    old, new = done.optim, config.optim
    if request.config.optim.decay_samples is None:
        end = total_samples(config.train, config.parallel.dp, done.step, done.samples)
        new = dataclasses.replace(new, decay_samples=max(end, new.warmup_samples))
    changed = [(key, getattr(old, key), getattr(new, key)) for key in CURVE if getattr(old, key) != getattr(new, key)]
    if new.lr_on_resume == "keep":
        for key, was, asked in changed:
            if f"optim.{key}" in request.explicit:
                raise ConfigError(
                    f"optim.{key}={asked} and optim.lr_on_resume=keep contradict each other: the saved run has "
                    f"optim.{key}={was}; leave one of them out"
                )
        if changed:
            say("learning rate: the saved run's curve, " + ", ".join(f"optim.{key}={was}" for key, was, _ in changed))
        kept = {key: getattr(old, key) for key in CURVE}
        return dataclasses.replace(config, optim=dataclasses.replace(new, **kept))
    before, after = learning_rate(old, done.samples), learning_rate(new, done.samples)
    if not math.isclose(before, after, rel_tol=1e-6):
        why = ", ".join(f"optim.{key} {was} -> {now}" for key, was, now in changed)
        by_hand = " ".join(f"optim.{key}={was}" for key, was, _ in changed)
        say(
            f"WARNING: the learning rate changes from {before:.3g} to {after:.3g} at step {done.step + 1} (sample "
            f"{done.samples}): {why}; to keep the old curve set {by_hand}, or optim.lr_on_resume=keep"
        )
    return dataclasses.replace(config, optim=new)
