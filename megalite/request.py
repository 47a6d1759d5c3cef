"""What a command line leaves open, filled in from its preset, its data and the runs that lie on the disk.

No torch: a run that cannot go on as it is asked for is refused before torch has loaded. `say` tells the user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint.folder import check_model, complete, find, read_manifest
from megalite.checkpoint.manifest import Damaged
from megalite.config import Config, ConfigError, Request, check, from_mapping, resolve
from megalite.config.batch import steps_for
from megalite.config.read import read_yaml_file
from megalite.config.schema import MOST_STEPS
from megalite.config.tune import check_adapter, is_adapter
from megalite.hf.folder import find_tokenizer

Say = Callable[[str], None]

# what rank 0 writes for a moment to see that a run folder can be written
PROBE = ".writable"


def one_length(request: Request) -> Request:
    """The request with train.steps or train.epochs, whichever the user set; the other is the preset's."""
    config, both = request.config, {"train.steps", "train.epochs"} & request.explicit
    if config.train.epochs is None or "train.steps" not in both:
        return request
    if len(both) == 2:
        raise ConfigError(
            f"train.steps={config.train.steps} and train.epochs={config.train.epochs:g} are both set; set one of them"
        )
    train = dataclasses.replace(config.train, epochs=None)
    return dataclasses.replace(request, config=dataclasses.replace(config, train=train))


def apart(request: Request) -> Request:
    """The request with a run folder of its own where its preset also pretrains: else it would go on from there."""
    if (request.preset or "").startswith("sft-") or "train.run_dir" in request.explicit:
        return request
    config = request.config
    folder = Path(config.train.run_dir)
    train = dataclasses.replace(config.train, run_dir=str(folder.with_name(f"sft-{folder.name}")))
    return dataclasses.replace(request, config=dataclasses.replace(config, train=train))


def with_tokenizer(request: Request, say: Say) -> Request:
    """With the tokenizer of the run it starts from, and so its chat template, where the request names none."""
    config, load = request.config, request.config.checkpoint.load
    if load is None or config.data.sft is None or config.data.tokenizer is not None:
        return request
    run_dir = find(load).parents[1]
    tokenizer = find_tokenizer(run_dir)
    if tokenizer is None:
        return request
    own = config.data.template is None and (run_dir / "chat_template.jinja").is_file()
    if not request.print_config:
        say(f"data.tokenizer={tokenizer}" + (f", data.template={run_dir / 'chat_template.jinja'}" if own else ""))
    data = dataclasses.replace(config.data, tokenizer=str(tokenizer))
    return dataclasses.replace(request, config=dataclasses.replace(config, data=data))


def with_epochs(config: Config, request: Request, samples: int, world_size: int, say: Say) -> Config:
    """train.epochs as train.steps, now that one epoch is known to have so many samples."""
    if config.train.epochs is None:
        return config
    steps = steps_for(config, config.train.epochs * samples)
    if steps > MOST_STEPS:
        raise ConfigError(
            f"train.epochs={config.train.epochs:g} of {samples} samples are {steps} steps, more than {MOST_STEPS:g}; "
            f"lower train.epochs"
        )
    say(f"train.epochs={config.train.epochs:g} of {samples} samples: {steps} steps")
    train = dataclasses.replace(config.train, steps=steps, epochs=None)
    optim = dataclasses.replace(config.optim, decay_samples=request.config.optim.decay_samples)
    config = resolve(dataclasses.replace(config, train=train, optim=optim), world_size)
    check(config, world_size)
    return config


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
            check_model(manifest, dataclasses.asdict(config.model), source)
            check_adapter(manifest, config, source, resume=False)
            goes_on = config.checkpoint.load_optim and (config.tune.mode != "lora" or is_adapter(manifest))
            if manifest["step"] >= config.train.steps and goes_on and not config.train.eval_only:
                raise ConfigError(
                    f"{source} is at step {manifest['step']}, of train.steps={config.train.steps} none is left; raise "
                    f"train.steps, or take the weights alone with checkpoint.load_optim=false"
                )
        return None
    check_model(read_manifest(newest), dataclasses.asdict(config.model), newest)
    check_adapter(read_manifest(newest), config, newest, resume=True)
    saved = run_dir / "config.yaml"
    for line in changed_keys(saved, config) if saved.is_file() else []:
        say(f"changed since the last run: {line}")
    return newest


def _holds_files(run_dir: Path) -> bool:
    # rank 0 may already try whether it can write here, while another rank still looks
    return any(path.name != PROBE for path in run_dir.iterdir())


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
    """`section.key: old -> new` of every key in which `config` differs from the saved one."""
    old, new = dataclasses.asdict(from_mapping(read_yaml_file(saved), str(saved))), dataclasses.asdict(config)
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
            f"train.run_dir={run_dir} cannot be written ({error.strerror}); name a folder on a disk with room"
        ) from None
