"""Which checkpoint a run continues from, and whether it may: everything that can be refused before torch has loaded.

`say` prints a line for the user.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megalite.checkpoint import lock
from megalite.checkpoint.contents import check_adapter, config_of, is_adapter, new_rows
from megalite.checkpoint.folder import check_model, complete, find, read_manifest
from megalite.checkpoint.manifest import Damaged
from megalite.config import Config, ConfigError, from_mapping, resolve_model
from megalite.config.read import read_yaml_file
from megalite.run import Say
from megalite.run.run_folder import holds_files, make_run_folder


def resume_from(config: Config, say: Say) -> Path | None:
    """The newest checkpoint in train.run_dir, from which the run continues; None if it starts anew.

    Says which keys have changed since the last run. Raises ConfigError or ValueError if the run may not use the folder,
    or if the checkpoint it would continue or start from does not fit the configuration.
    """
    run_dir, resume = Path(config.train.run_dir), config.checkpoint.resume
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"train.run_dir={run_dir} is a file; name a folder")
    newest = newest_readable(run_dir, say)
    if resume == "never" and run_dir.is_dir() and holds_files(run_dir):
        raise ConfigError(
            f"train.run_dir={run_dir} is not empty and checkpoint.resume=never; choose another folder, "
            f"or checkpoint.resume=auto to continue"
        )
    if newest is not None:
        _check_continued(config, newest)
        _say_changes(config, run_dir / "config.yaml", say)
        return newest
    if resume == "must":
        raise ConfigError(f"checkpoint.resume=must, but {run_dir} has no finished checkpoint")
    if run_dir.is_dir() and not (run_dir / "config.yaml").is_file() and holds_files(run_dir):
        raise ConfigError(f"train.run_dir={run_dir} holds other files; choose a new or empty folder")
    if config.checkpoint.load is not None:
        _check_loaded(config, find(config.checkpoint.load))
    return None


def newest_readable(run_dir: Path, say: Say) -> Path | None:
    """The newest checkpoint whose manifest can be read; None if there is no checkpoint. Says which are passed over.

    Raises Damaged if there are checkpoints and none can be read.
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


def _check_continued(config: Config, newest: Path) -> None:
    """Raise ConfigError or ValueError if the run cannot continue from its own checkpoint."""
    manifest = read_manifest(newest)
    check_model(manifest, dataclasses.asdict(config.model), newest)
    kept = config_of(manifest).model.add_tokens
    if kept != config.model.add_tokens:
        raise ConfigError(
            f"{newest} was trained with model.add_tokens=[{', '.join(kept)}]; use the same here, or start another run "
            f"with checkpoint.load={newest.parents[1]}"
        )
    check_adapter(manifest, config, newest, resume=True)


def _check_loaded(config: Config, source: Path) -> None:
    """Raise ConfigError or ValueError if the run cannot start from the checkpoint that checkpoint.load names."""
    manifest = read_manifest(source)
    check_model(manifest, dataclasses.asdict(config.model), source, grows=bool(config.model.add_tokens))
    if new_rows(config, config_of(manifest).model.add_tokens) and config.checkpoint.load_optim:
        raise ConfigError(
            f"model.add_tokens: the optimizer state of {source} has no rows for them; set checkpoint.load_optim=false"
        )
    check_adapter(manifest, config, source, resume=False)
    counts_on = config.checkpoint.load_optim and (config.tune.mode != "lora" or is_adapter(manifest))
    if manifest["step"] >= config.train.steps and counts_on and not config.train.eval_only:
        raise ConfigError(
            f"{source} is at step {manifest['step']} and train.steps={config.train.steps}: no step is left; raise "
            f"train.steps, or load only its weights with checkpoint.load_optim=false"
        )


def _say_changes(config: Config, saved: Path, say: Say) -> None:
    try:
        changed = changed_keys(saved, config) if saved.is_file() else []
    except ConfigError as error:
        say(f"note: {error}; it will be rewritten")
        return
    for line in changed:
        say(f"changed since the last run: {line}")


def changed_keys(saved: Path, config: Config) -> list[str]:
    """`section.key: old -> new` of every key in which `config` differs from the config.yaml `saved`.

    Raises ConfigError if that cannot be read.
    """
    if not saved.read_bytes().strip():
        raise ConfigError(f"{saved} is empty")
    before = from_mapping(read_yaml_file(saved), str(saved))
    # an older version did not write every key of the model
    before = dataclasses.replace(before, model=resolve_model(before.model, before.train.seq_len))
    old, new = dataclasses.asdict(before), dataclasses.asdict(config)
    return [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]


def take_run_folder(config: Config, resume: Path | None) -> None:
    """Make train.run_dir and lock it for this run, which continues from `resume`.

    Raises ConfigError if another run has it, or has ended just now and left another checkpoint to continue from.
    """
    run_dir = Path(config.train.run_dir)
    make_run_folder(run_dir)
    lock.hold(run_dir)
    if resume_from(config, lambda _: None) != resume:
        lock.release(run_dir)
        raise ConfigError(
            f"train.run_dir={run_dir}: another run has saved there while this one started; start it again"
        )
