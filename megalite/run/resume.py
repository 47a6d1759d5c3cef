"""What a run that continues is bound by: its checkpoint, its learning-rate curve, its folder.

No torch: a run that cannot go on as it is asked for is refused before torch has loaded. `say` tells the user.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint import lock
from megalite.checkpoint.contents import check_adapter, is_adapter, new_rows
from megalite.checkpoint.folder import check_model, complete, find, read_manifest
from megalite.checkpoint.manifest import Damaged
from megalite.config import Config, ConfigError, Request, check, from_mapping, resolve
from megalite.config.batch import steps_for, total_samples
from megalite.config.read import read_yaml_file
from megalite.config.schema import MOST_STEPS, OptimConfig
from megalite.config.shapes import with_family
from megalite.optim.lr import learning_rate
from megalite.watch import disk

Say = Callable[[str], None]

# how the names begin of what rank 0 writes for a moment, to see that a run folder can be written and that all see it
PROBE = ".writable"

# the keys that make the learning-rate curve
CURVE = ("lr", "min_lr", "lr_schedule", "wsd_decay_fraction", "warmup_samples", "decay_samples")


def with_epochs(config: Config, request: Request, samples: int, world_size: int, say: Say) -> Config:
    """train.epochs as train.steps, now that one epoch is known to have so many samples."""
    if config.train.epochs is None:
        return config
    begun = continued(config)
    step, used = (0, 0) if begun is None else (begun.step, begun.samples)
    steps = steps_for(config, config.train.epochs * samples, step, used)
    if steps > MOST_STEPS:
        raise ConfigError(
            f"train.epochs={config.train.epochs:g} of {samples} samples are {steps} steps, more than {MOST_STEPS:g}; "
            f"lower train.epochs"
        )
    say(f"train.epochs={config.train.epochs:g} of {samples} samples: {steps} steps")
    total, warmup = int(config.train.epochs * samples), config.optim.warmup_samples
    if warmup > total:
        say(
            f"warning: the learning rate does not reach optim.lr={config.optim.lr:g}: optim.warmup_samples={warmup} is "
            f"more than the {total} samples of the run; set it to {total // 10}"
        )
    train = dataclasses.replace(config.train, steps=steps, epochs=None)
    optim = dataclasses.replace(config.optim, decay_samples=request.config.optim.decay_samples)
    config = resolve(dataclasses.replace(config, train=train, optim=optim), world_size)
    check(config, world_size)
    return config


@dataclasses.dataclass(frozen=True)
class Continued:
    """Where the run that is continued stands, and the learning-rate curve it had."""

    step: int
    samples: int
    optim: OptimConfig


def continued(config: Config) -> Continued | None:
    """What the counters of this run begin with; None where it starts at zero.

    That is the run's own newest checkpoint, else checkpoint.load with its counters.
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
    return Continued(manifest["step"], manifest["consumed_samples"], OptimConfig(**curve))


def with_curve(config: Config, request: Request, say: Say) -> Config:
    """With the learning-rate curve of a run that continues: it ends where the run ends, or is the saved run's.

    Says from what to what the rate changes at this point. ConfigError where keys were set that the saved curve, which
    optim.lr_on_resume=keep asks for, does not have.
    """
    begun = continued(config)
    if begun is None or not 0 < begun.step < config.train.steps or begun.optim.decay_samples is None:
        return config
    old, new = begun.optim, config.optim
    if request.config.optim.decay_samples is None:
        end = max(total_samples(config, begun.step, begun.samples), new.warmup_samples)
        new = dataclasses.replace(new, decay_samples=end)
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
    before, after = learning_rate(old, begun.samples), learning_rate(new, begun.samples)
    if not math.isclose(before, after, rel_tol=1e-6):
        why = ", ".join(f"optim.{key} {was} -> {now}" for key, was, now in changed)
        by_hand = " ".join(f"optim.{key}={was}" for key, was, _ in changed)
        say(
            f"WARNING: the learning rate changes from {before:.3g} to {after:.3g} at step {begun.step + 1} (sample "
            f"{begun.samples}): {why}; to keep the old curve set {by_hand}, or optim.lr_on_resume=keep"
        )
    return dataclasses.replace(config, optim=new)


def resume_from(config: Config, say: Say) -> Path | None:
    """The checkpoint that train.run_dir goes on from; ConfigError where the folder must not be touched."""
    run_dir, resume = Path(config.train.run_dir), config.checkpoint.resume
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"train.run_dir={run_dir} is a file; name a folder")
    newest = newest_readable(run_dir, say)
    if resume == "never" and run_dir.is_dir() and _holds_files(run_dir):
        raise ConfigError(
            f"train.run_dir={run_dir} is not empty and checkpoint.resume=never; choose another folder, "
            f"or checkpoint.resume=auto to go on"
        )
    if newest is None:
        if resume == "must":
            raise ConfigError(f"checkpoint.resume=must, but {run_dir} has no finished checkpoint")
        if run_dir.is_dir() and not (run_dir / "config.yaml").is_file() and _holds_files(run_dir):
            raise ConfigError(f"train.run_dir={run_dir} holds other files; choose a new or empty folder")
        if config.checkpoint.load is not None:
            source = find(config.checkpoint.load)
            manifest = read_manifest(source)
            check_model(manifest, dataclasses.asdict(config.model), source, grows=bool(config.model.add_tokens))
            if new_rows(config, manifest["config"]["model"].get("add_tokens", ())) and config.checkpoint.load_optim:
                raise ConfigError(
                    f"model.add_tokens: the optimizer state of {source} has no rows for them; set "
                    f"checkpoint.load_optim=false"
                )
            check_adapter(manifest, config, source, resume=False)
            goes_on = config.checkpoint.load_optim and (config.tune.mode != "lora" or is_adapter(manifest))
            if manifest["step"] >= config.train.steps and goes_on and not config.train.eval_only:
                raise ConfigError(
                    f"{source} is at step {manifest['step']}, of train.steps={config.train.steps} none is left; raise "
                    f"train.steps, or take the weights alone with checkpoint.load_optim=false"
                )
        return None
    check_model(read_manifest(newest), dataclasses.asdict(config.model), newest)
    kept = read_manifest(newest)["config"]["model"].get("add_tokens", ())
    if tuple(kept) != config.model.add_tokens:
        raise ConfigError(
            f"{newest} was trained with model.add_tokens=[{', '.join(kept)}]; use the same here, or begin another run "
            f"with checkpoint.load={run_dir}"
        )
    check_adapter(read_manifest(newest), config, newest, resume=True)
    saved = run_dir / "config.yaml"
    try:
        changed = changed_keys(saved, config) if saved.is_file() else []
    except ConfigError as error:
        say(f"note: {error}; it is written again")
        return newest
    for line in changed:
        say(f"changed since the last run: {line}")
    return newest


def _holds_files(run_dir: Path) -> bool:
    # rank 0 may already try whether it can write here and take the folder, while another rank still looks
    return any(path.name != lock.NAME and not path.name.startswith((PROBE, lock.BESIDE)) for path in run_dir.iterdir())


def newest_readable(run_dir: Path, say: Say) -> Path | None:
    """The newest checkpoint whose manifest can be read, telling of each that is passed over; None if there is none.

    Damaged where there are some and none can be read.
    """
    damage: list[str] = []
    for folder in reversed(complete(run_dir)):
        try:
            read_manifest(folder)
        except Damaged as error:
            damage.append(str(error))
            continue
        for line in damage:
            say(f"note: {line}")
        return folder
    if damage:
        raise Damaged("; ".join(damage))
    return None


def changed_keys(saved: Path, config: Config) -> list[str]:
    """`section.key: old -> new` of every key in which `config` differs from the saved one.

    ConfigError where that cannot be read.
    """
    if not saved.read_bytes().strip():
        raise ConfigError(f"{saved} is empty")
    before = from_mapping(read_yaml_file(saved), str(saved))
    before = dataclasses.replace(before, model=with_family(before.model))
    old, new = dataclasses.asdict(before), dataclasses.asdict(config)
    return [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]


def make_run_folder(run_dir: Path) -> None:
    """Make the folder before the ranks spend seconds on starting; ConfigError where it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / PROBE
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"train.run_dir={run_dir} cannot be written ({error.strerror}). {disk.remedy(error)}"
        ) from None


def take_run_folder(config: Config, resume: Path | None) -> None:
    """Make train.run_dir and hold it for this run, which goes on from `resume`; ConfigError where another run has it.

    A run that ended just before may have left another checkpoint to go on from: that is told too.
    """
    run_dir = Path(config.train.run_dir)
    make_run_folder(run_dir)
    lock.hold(run_dir)
    if resume_from(config, lambda _: None) != resume:
        lock.release(run_dir)
        raise ConfigError(
            f"train.run_dir={run_dir}: another run has saved there while this one started; start it again"
        )
