"""What the scripts in examples/ call: command line to finished run, every mistake told in one line.

All that can be wrong without torch is looked for before torch is imported.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import re
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from megalite import plan
from megalite.checkpoint.folder import check_model, complete, find, read_manifest
from megalite.checkpoint.manifest import Damaged
from megalite.config import Config, ConfigError, Request, check, parse_command_line, resolve, to_yaml
from megalite.config.batch import steps_for, total_samples
from megalite.config.load import read_yaml_file
from megalite.config.tune import check_adapter, is_adapter
from megalite.hf.keys import check_hf, with_hf
from megalite.place import place
from megalite.watch.metrics import require_tensorboard

if typing.TYPE_CHECKING:
    from megalite.data.sets import DataSets
    from megalite.parallel.groups import World

HERE = place()
RANK, WORLD_SIZE, LOCAL_RANKS = HERE.rank, HERE.world_size, HERE.local_ranks


def fail(message: object, speaks: bool = RANK == 0) -> int:
    """Tell the user once, not once a rank; the other ranks wait a moment so that the launcher lets that one speak."""
    if isinstance(message, OSError) and message.filename and message.strerror:
        message = f"{message.filename}: {message.strerror}"
    if speaks:
        sys.stdout.flush()
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(1.0)
    return 2


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def pretrain(argv: Sequence[str], *, default_preset: str, corpus: Path, instructions: Path | None = None) -> int:
    """Run `examples/pretrain_7b.py`; gives the exit status. `corpus`: what the preset tiny learns from by itself.

    `instructions`: what it learns from where this is `examples/sft_7b.py`.
    """
    # which kernel and which reader were chosen is said once, by one rank
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("megalite").setLevel(logging.INFO if RANK == 0 else logging.WARNING)
    try:
        request = parse_command_line(argv, default_preset=default_preset, prog=Path(sys.argv[0]).name)
        request = one_length(request)
        if instructions is not None:
            request = apart(request)
        config, why = configure(with_hf(request))
        if request.print_config:
            say(to_yaml(config).rstrip())
            return 0
        name = request.preset or "model" if config.model.from_hf is None else Path(config.model.from_hf).name
        say(f"{name}: {plan.parameters(config.model) / 1e6:.1f}e6 parameters, {why}")
        if config.tune.mode != "full" or config.tune.freeze:
            say(plan.describe_trained(config))
        need = plan.check_memory(config, WORLD_SIZE, LOCAL_RANKS)
        if request.dry_run:
            say(to_yaml(config) + describe(config, need))
            return 0
        if config.log.tensorboard:
            require_tensorboard()
        if not HERE.master:
            raise ConfigError(
                f"srun started {WORLD_SIZE} ranks on several nodes and MASTER_ADDR is not set: before srun, "
                f'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        config = with_corpus(config, corpus, request, instructions)
        if instructions is not None and config.data.sft is None:
            raise ConfigError(
                "data.sft is not set: which conversations should the model learn from? e.g. data.sft=chats.jsonl "
                "data.tokenizer=tokenizer.json checkpoint.load=runs/llama2-7b checkpoint.load_optim=false"
            )
        from megalite.data.sets import open_data

        data = open_data(config, scan=RANK == 0)
        config = with_epochs(config, request, len(data.train))
        resume = resume_from(config)
        if resume is not None and read_manifest(resume)["step"] >= config.train.steps and not config.train.eval_only:
            say(
                f"{config.train.run_dir} is complete: step {read_manifest(resume)['step']} of {config.train.steps}; "
                f"raise train.steps to go on, or choose another train.run_dir"
                + ("; tools/checkpoint.py convert exports it" if config.train.export_hf else "")
            )
            return 0
        check_hf(config, resume)
        make_run_folder(Path(config.train.run_dir))
    except (ConfigError, ValueError, OSError) as error:
        return fail(error)
    return run(config, data, resume)


def leave(status: int) -> NoReturn:
    """End this process with `status`.

    A rank does not wait for the interpreter to be taken down: threads of the communication library may still let go of
    a tensor, need Python for it, and would abort the process at its very end.
    """
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def configure(request: Request) -> tuple[Config, str]:
    """The resolved and checked configuration, and how its topology was chosen."""
    config, why = plan.choose_topology(request.config, WORLD_SIZE, LOCAL_RANKS, request.explicit)
    config = resolve(config, WORLD_SIZE)
    check(config, WORLD_SIZE)
    return config, why


def describe(config: Config, need: plan.Memory) -> str:
    """The plan in a few lines: stages, batch, memory, work."""
    p, t = config.parallel, config.train
    pp = p.pp or 1
    stages = ", ".join(f"{len(r)}" for r in plan.stage_layers(config))
    microbatches = t.global_batch_size // (t.micro_batch_size * (p.dp or 1))
    tokens = t.global_batch_size * t.seq_len
    flops = plan.run_flops(config)
    # how many steps an epoch has is not known before the data are read
    length = f"{total_samples(config) * t.seq_len / 1e6:.1f}e6 tokens" if t.epochs is None else f"{t.epochs:g} epochs"
    return (
        f"plan:\n"
        f"  mesh: pp {pp} x dp {p.dp} x cp {p.cp} x tp {p.tp}, sequence parallel {'on' if p.sp else 'off'}\n"
        f"  layers by stage: {stages}; {p.schedule}, {microbatches} microbatches, bubble "
        f"{(pp - 1) / (microbatches + pp - 1):.1%}\n"
        f"  memory of the fullest rank: {need.table()}\n"
        f"  work: {flops / 1e9:.2f} GFLOP per token, {flops * tokens / 1e12:.2f} TFLOP per step, "
        f"{length} in all"
    )


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


def with_epochs(config: Config, request: Request, samples: int) -> Config:
    """train.epochs as train.steps, now that one epoch is known to have so many samples."""
    if config.train.epochs is None:
        return config
    steps = steps_for(config, config.train.epochs * samples)
    say(f"train.epochs={config.train.epochs:g} of {samples} samples: {steps} steps")
    train = dataclasses.replace(config.train, steps=steps, epochs=None)
    optim = dataclasses.replace(config.optim, decay_samples=request.config.optim.decay_samples)
    return resolve(dataclasses.replace(config, train=train, optim=optim), WORLD_SIZE)


def with_corpus(config: Config, corpus: Path, request: Request, instructions: Path | None = None) -> Config:
    """For the preset tiny without data: the committed corpus, prepared once and cached.

    With `instructions` it gives the tokenizer, and they are the data.
    """
    chosen = config.data.path is not None or config.data.sft is not None or config.model.from_hf is not None
    if chosen or request.preset != "tiny":
        return config
    from megalite.data.corpus import prepare

    cache = Path(config.data.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        # the first rank to come prepares, the others find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = prepare(corpus, cache, config.model.vocab_size)
    if instructions is not None:
        template = config.data.template or "plain"
        data = dataclasses.replace(
            config.data, sft=str(instructions), tokenizer=str(found.tokenizer), template=template
        )
        return dataclasses.replace(config, data=data)
    data = dataclasses.replace(
        config.data,
        path=str(found.train),
        valid=config.data.valid or {name: str(prefix) for name, prefix in found.heldout.items()},
        tokenizer=str(found.tokenizer),
    )
    return dataclasses.replace(config, data=data)


def resume_from(config: Config) -> Path | None:
    """The checkpoint that train.run_dir goes on from; ConfigError where the folder must not be touched."""
    run_dir, resume = Path(config.train.run_dir), config.checkpoint.resume
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"train.run_dir={run_dir} is a file; name a folder")
    newest = newest_readable(run_dir)
    if resume == "never" and run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConfigError(
            f"train.run_dir={run_dir} is not empty and checkpoint.resume=never; choose another folder, "
            f"or checkpoint.resume=auto to go on"
        )
    if newest is None:
        if resume == "must":
            raise ConfigError(f"checkpoint.resume=must, but {run_dir} has no finished checkpoint")
        if run_dir.is_dir() and not (run_dir / "config.yaml").is_file() and any(run_dir.iterdir()):
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


def newest_readable(run_dir: Path) -> Path | None:
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


def make_run_folder(run_dir: Path) -> None:
    """One rank makes the folder, before the ranks spend seconds on starting; ConfigError where it cannot be written."""
    if RANK != 0:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"train.run_dir={run_dir} cannot be written ({error.strerror}); name a folder on a disk with room"
        ) from None


def changed_keys(saved: Path, config: Config) -> list[str]:
    """`section.key: old -> new` of every key in which `config` differs from the saved one."""
    from megalite.config import from_mapping

    old, new = dataclasses.asdict(from_mapping(read_yaml_file(saved), str(saved))), dataclasses.asdict(config)
    return [
        f"{section}.{key}: {old[section][key]} -> {value}"
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    ]


def export(config: Config) -> None:
    """Write the finished run as a Hugging Face folder. One rank does it, after the last collective."""
    from megalite.hf.convert import to_hf_folder

    assert config.train.export_hf is not None
    if RANK == 0:
        say(f"exported {to_hf_folder(Path(config.train.run_dir), Path(config.train.export_hf))}")


def run(config: Config, data: DataSets, resume: Path | None) -> int:
    """Train, and export what was learned if that is asked for; gives the exit status."""
    done = False

    def main(world: World) -> None:
        nonlocal done
        from megalite.trainer import train

        done = train(config, data, world, resume).step >= config.train.steps and not config.train.eval_only

    status = in_world(config, main)
    if status == 0 and done and config.train.export_hf is not None:
        try:
            export(config)
        except (ValueError, OSError) as error:
            return fail(error, speaks=True)
    return status


def in_world(config: Config, main: Callable[[World], None]) -> int:
    """Import torch, start the world, call `main` in it; gives the exit status, every failure told in one line."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from megalite.batches import TrainingError
    from megalite.parallel.launch import Echo, start_world

    try:
        with start_world(config) as world:
            main(world)
    except Echo:
        time.sleep(1.0)
        os._exit(1)
    except (TrainingError, ValueError, OSError) as error:
        return fail(error, speaks=True)
    except torch.OutOfMemoryError as error:
        print(f"error: rank {RANK} ran out of memory: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(1)
    except RuntimeError as error:
        if not re.search(r"gloo|nccl|connection|timed? ?out|store", str(error), re.IGNORECASE):
            raise  # a fault of ours: its traceback is wanted
        # a peer is gone: say so and end at once, so that the launcher can end the others
        print(f"error: rank {RANK} lost the others: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        os._exit(1)
    return 0
