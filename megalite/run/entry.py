"""What the scripts in examples/ call: from a command line to a finished run. docs/design.md has the way in a table.

Whatever can be wrong without torch is checked before torch is imported, and each mistake is reported in one line.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint import lock
from megalite.checkpoint.folder import read_manifest
from megalite.config import ConfigError, Request, Resolved, to_yaml
from megalite.data.origin import with_its_tokenizer
from megalite.exchange.hf_folder import find_tokenizer
from megalite.exchange.hf_keys import check_hf, context_warning
from megalite.plan import counts
from megalite.plan.describe import describe
from megalite.plan.topology import Machine, check_memory, lay_out, other_machine, this_machine
from megalite.run.agree import Report, report
from megalite.run.command import understand
from megalite.run.length import with_curve, with_epochs
from megalite.run.objective import Objective, objective_of
from megalite.run.resume import resume_from, take_run_folder
from megalite.run.together import (
    HERE,
    LOCAL_RANKS,
    RANK,
    WORLD_SIZE,
    complete_together,
    describe_error,
    fail,
    hear_signals,
    in_world,
    print_error,
    require_peers,
)
from megalite.watch.metrics import require_tensorboard

if typing.TYPE_CHECKING:
    from megalite.data.sets import DataSets
    from megalite.model.decoder import Decoder
    from megalite.parallel.groups import World


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def pretrain(
    argv: Sequence[str],
    *,
    default_preset: str,
    corpus: Path,
    objective: Objective | None = None,
    decoder: type[Decoder] | None = None,
) -> int:
    """Run `examples/pretrain_7b.py`, or the script of another objective. Returns the exit status.

    objective: what the script trains for; None: the one that applies to the configuration. corpus: the folder of text
    that the preset tiny learns from by default. decoder: a class of model other than `Decoder` (docs/extending.md).
    """
    tuning = objective is not None and objective.starts_trained
    hear_signals()
    log_choices()
    try:
        request = understand(argv, default_preset, tuning, say)
        machine = machine_of(request)
        config, why = lay_out(request.config, machine, request.explicit)
        if request.print_config:
            say(to_yaml(config).rstrip())
            return 0
        introduce(request, config, why)
        if request.dry_run:
            return show_plan(request, config, machine)
        check_memory(config, machine, first_try(request))
        check_this_machine(config)
        config = with_demo_data(request, config, corpus, tuning)
        objective = objective or objective_of(config)
        config, data = open_sets(config, objective, scan=RANK == 0)
        config = with_epochs(config, request, len(data.train), WORLD_SIZE, say)
        config = with_curve(config, request, say)
        resume = resume_from(config, say)
        if resume is not None and is_complete(config, resume):
            return 0 if WORLD_SIZE == 1 else complete_together(config, resume)
        if tuning and resume is None and not (config.checkpoint.load or config.model.from_hf):
            say("note: neither checkpoint.load nor model.from_hf is set: training starts from fresh weights")
        check_hf(config, resume)
        if RANK == 0:
            take_run_folder(config, resume)
        mine = report(config, resume, HERE) if WORLD_SIZE > 1 else None
    except (ConfigError, ValueError, OSError) as error:
        return fail(error, meets=not {"--dry-run", "--print-config"} & set(argv))
    return run(config, objective, data, resume, mine, decoder)


def log_choices() -> None:
    """Print which kernel and which reader of data were chosen, on one rank."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("megalite").setLevel(logging.INFO if RANK == 0 else logging.WARNING)


def machine_of(request: Request) -> Machine:
    """The machine of this run, or with world= and gpu= the one to plan for."""
    device, asked = request.config.train.device, request.hardware
    if asked is None:
        return this_machine(device, WORLD_SIZE, LOCAL_RANKS)
    return other_machine(device, asked.world or WORLD_SIZE, asked.per_node, asked.gpu)


def first_try(request: Request) -> bool:
    """Whether the user has asked for nothing in particular."""
    return not request.preset_named and not request.explicit and request.hardware is None


def introduce(request: Request, config: Resolved, why: str) -> None:
    """Print what is trained, how it is laid out, and what the user may want to know before it starts."""
    if HERE.note:
        say(HERE.note)
    name = request.preset or "model" if config.model.from_hf is None else Path(config.model.from_hf).name
    say(f"{name}: {counts.parameters(config.model) / 1e6:.1f}e6 parameters, {why}")
    if config.tune.mode != "full" or config.tune.freeze:
        say(counts.describe_trained(config))
    if config.optim.name == "muon":
        say(counts.describe_muon(config))
    if warning := context_warning(config):
        say(warning)


def show_plan(request: Request, config: Resolved, machine: Machine) -> int:
    """Print configuration and plan for --dry-run, and check memory and data. Returns the exit status."""
    say(to_yaml(config) + describe(config, machine))
    check_memory(config, machine, first_try(request))
    if RANK == 0 and request.hardware is None and (config.data.path is not None or config.data.sft is not None):
        with tempfile.TemporaryDirectory(prefix="megalite-") as scratch:
            data = dataclasses.replace(config.data, cache_dir=scratch)
            config, opened = open_sets(dataclasses.replace(config, data=data), objective_of(config), scan=True)
            say(f"data: {opened.fingerprint}; one epoch is {len(opened.train)} samples")
            with_epochs(config, request, len(opened.train), WORLD_SIZE, say)
    return 0


def check_this_machine(config: Resolved) -> None:
    """Raise ConfigError if this rank cannot run here: threads, run folder, TensorBoard, other ranks."""
    threads, cores = config.train.threads, os.cpu_count() or 1
    # each thread costs memory, and an entry in the machine's table of processes
    if threads > max(16, cores):
        raise ConfigError(
            f"train.threads={threads} per rank on a machine with {cores} cores; use train.threads="
            f"{max(1, cores // LOCAL_RANKS)} or less, or 0 to share the cores among the ranks"
        )
    if RANK == 0:
        lock.require_free(Path(config.train.run_dir))
    if config.log.tensorboard:
        require_tensorboard()
    require_peers()


def with_demo_data(request: Request, config: Resolved, corpus: Path, tuning: bool) -> Resolved:
    """`config` with the data that the preset tiny has if the user names none."""
    chosen = config.data.path is not None or config.data.sft is not None or config.model.from_hf is not None
    if request.preset != "tiny" or chosen:
        return config
    from megalite.data.demo import demo_data

    data = demo_data(config.data, corpus, config.model.vocab_size, tuning)
    return dataclasses.replace(config, data=data)


def open_sets(config: Resolved, objective: Objective, scan: bool) -> tuple[Resolved, DataSets]:
    """The data of the run, opened and checked, and `config` with their tokenizer. Raises ValueError."""
    config = dataclasses.replace(config, data=with_its_tokenizer(config.data, Path(config.train.run_dir), say))
    return config, objective.open_data(config, scan)


def is_complete(config: Resolved, resume: Path) -> bool:
    """Whether the run to continue has no step left; prints what the user can do."""
    step = read_manifest(resume)["step"]
    if step < config.train.steps or config.train.eval_only:
        return False
    say(
        f"{config.train.run_dir} is complete: step {step} of {config.train.steps}; "
        f"raise train.steps to continue, or choose another train.run_dir"
        + ("; tools/checkpoint.py convert exports it" if config.train.export_hf else "")
    )
    return True


def run(
    config: Resolved,
    objective: Objective,
    data: DataSets,
    resume: Path | None,
    mine: Report | None,
    decoder: type[Decoder] | None = None,
) -> int:
    """Train, then export if train.export_hf is set. Returns the exit status. `mine`: the report to the other ranks."""
    done = False

    def main(world: World) -> None:
        nonlocal done
        from megalite.model.decoder import Decoder
        from megalite.run.trainer import train

        state = train(config, objective, data, world, resume, decoder or Decoder)
        done = state.step >= config.train.steps and not config.train.eval_only

    try:
        status = in_world(config, main, mine, Path(config.train.run_dir))
    finally:
        if RANK == 0:
            lock.release(Path(config.train.run_dir))
    if status == 0 and done and RANK == 0 and config.train.export_hf is not None:
        try:
            export(Path(config.train.run_dir), Path(config.train.export_hf))
        except (ValueError, OSError) as error:
            return print_error(describe_error(error))
    return status


def export(run_dir: Path, target: Path) -> None:
    """Write the finished run as a Hugging Face folder, on one rank after the last collective."""
    from megalite.exchange.convert import to_hf_folder

    folder = to_hf_folder(run_dir, target)
    say(f"exported {folder}" + ("" if find_tokenizer(folder) else ", without a tokenizer: the run has none"))
