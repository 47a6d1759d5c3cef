"""What the scripts in examples/ call: command line to finished run, every mistake told in one line.

All that can be wrong without torch is looked for before torch is imported.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint import lock
from megalite.checkpoint.folder import read_manifest
from megalite.config import Config, ConfigError, Request, check, parse_command_line, resolve, to_yaml
from megalite.config.batch import total_samples
from megalite.exchange.hf_folder import find_tokenizer
from megalite.exchange.hf_keys import check_hf, context_warning, with_hf
from megalite.pipeline.forecast import bubble
from megalite.plan import counts, topology
from megalite.plan.costs import stage_layers
from megalite.run.agree import Report, report
from megalite.run.loaded import settle, with_loaded, with_template
from megalite.run.objective import Objective, objective_of
from megalite.run.request import apart, one_length, with_added_tokens, with_data_tokenizer, with_tokenizer
from megalite.run.resume import resume_from, take_run_folder, with_curve, with_epochs
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
    from megalite.parallel.groups import World


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def pretrain(argv: Sequence[str], *, default_preset: str, corpus: Path, objective: Objective | None = None) -> int:
    """Run `examples/pretrain_7b.py`, or the script of another objective; returns the exit status.

    objective: what the script trains for. None: what the configuration names data for. corpus: what the preset tiny
    learns from by default.
    """
    tuning = objective is not None and objective.starts_trained
    hear_signals()
    # which kernel and which reader were chosen is said once, by one rank
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("megalite").setLevel(logging.INFO if RANK == 0 else logging.WARNING)
    try:
        request = understand(argv, default_preset, tuning)
        machine = machine_of(request)
        config, why = configure(request, machine)
        if request.print_config:
            say(to_yaml(config).rstrip())
            return 0
        introduce(request, config, why)
        if request.dry_run:
            say(to_yaml(config) + describe(config, machine))
        first_try = not request.preset_named and not request.explicit and request.hardware is None
        topology.check_memory(config, machine, first_try)
        if request.dry_run:
            if RANK == 0 and request.hardware is None:
                look_at_data(config, request)
            return 0
        check_threads(config)
        if RANK == 0:
            lock.require_free(Path(config.train.run_dir))
        if config.log.tensorboard:
            require_tensorboard()
        require_peers()
        config = with_corpus(config, corpus, request, tuning)
        objective = objective or objective_of(config)
        config = with_data_tokenizer(config, say)
        data = objective.open_data(config, RANK == 0)
        config = with_epochs(config, request, len(data.train), WORLD_SIZE, say)
        config = with_curve(config, request, say)
        resume = resume_from(config, say)
        if resume is not None and read_manifest(resume)["step"] >= config.train.steps and not config.train.eval_only:
            say(
                f"{config.train.run_dir} is complete: step {read_manifest(resume)['step']} of {config.train.steps}; "
                f"raise train.steps to go on, or choose another train.run_dir"
                + ("; tools/checkpoint.py convert exports it" if config.train.export_hf else "")
            )
            return 0 if WORLD_SIZE == 1 else complete_together(config, resume)
        if tuning and resume is None and not (config.checkpoint.load or config.model.from_hf):
            say("note: neither checkpoint.load nor model.from_hf is set: training starts from fresh weights")
        check_hf(config, resume)
        if RANK == 0:
            take_run_folder(config, resume)
        mine = report(config, resume, HERE) if WORLD_SIZE > 1 else None
    except (ConfigError, ValueError, OSError) as error:
        return fail(error, meets=not {"--dry-run", "--print-config"} & set(argv))
    return run(config, objective, data, resume, mine)


def understand(argv: Sequence[str], default_preset: str, tuning: bool) -> Request:
    """The request of a command line, filled in from the files, folders and runs that it names."""
    request = parse_command_line(argv, default_preset=default_preset, prog=Path(sys.argv[0]).name)
    tell = (lambda text: None) if request.print_config else say
    request = one_length(settle(request, tell))
    if tuning:
        request = apart(request)
    request = with_hf(with_loaded(request, tuning, tell))
    if tuning:
        request = with_template(with_tokenizer(request, tell), tell)
    return with_added_tokens(request)


def introduce(request: Request, config: Config, why: str) -> None:
    """Say what is trained, how it is laid out, and what the user may want to know before it starts."""
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


def machine_of(request: Request) -> topology.Machine:
    """What the run, or with world= and gpu= the plan, has."""
    device, asked = request.config.train.device, request.hardware
    if asked is None:
        return topology.this_machine(device, WORLD_SIZE, LOCAL_RANKS)
    return topology.other_machine(device, asked.world or WORLD_SIZE, asked.per_node, asked.gpu)


def configure(request: Request, machine: topology.Machine | None = None) -> tuple[Config, str]:
    """The resolved and checked configuration for `machine`, else for this one, and how its topology was chosen."""
    machine = machine or machine_of(request)
    config, why = topology.choose_topology(request.config, machine, request.explicit)
    config = resolve(config, machine.ranks)
    check(config, machine.ranks)
    return config, why


def check_threads(config: Config) -> None:
    """ConfigError for more threads than this machine can have use of: each costs memory, and a place in its table."""
    threads, cores = config.train.threads, os.cpu_count() or 1
    if threads > max(16, cores):
        raise ConfigError(
            f"train.threads={threads} of each rank on a machine of {cores} cores; use train.threads="
            f"{max(1, cores // LOCAL_RANKS)} or less, or 0 to share the cores among the ranks"
        )


def describe(config: Config, machine: topology.Machine) -> str:
    """The plan in a few lines: stages, batch, memory, work."""
    p, t = config.parallel, config.train
    ranks, layers = p.pp or 1, stage_layers(config)
    # a rank with several stages holds every ranks-th of them
    stages = ", ".join("+".join(f"{len(r)}" for r in layers[rank::ranks]) for rank in range(ranks))
    microbatches = t.global_batch_size // (t.micro_batch_size * (p.dp or 1))
    tokens = t.global_batch_size * t.seq_len
    flops = counts.run_flops(config)
    # how many steps an epoch has is not known before the data are read
    length = f"{total_samples(config) * t.seq_len / 1e6:.1f}e6 tokens" if t.epochs is None else f"{t.epochs:g} epochs"
    return (
        f"plan:\n"
        f"  mesh: pp {ranks} x dp {p.dp} x cp {p.cp} x tp {p.tp}, sequence parallel {'on' if p.sp else 'off'}\n"
        f"  layers by {'stage' if p.chunks == 1 else 'rank and stage'}: {stages}; {p.schedule}, {microbatches} "
        f"microbatches, bubble {bubble(p.schedule, ranks, microbatches, p.chunks):.1%}\n"
        f"{topology.memory_table(config, machine)}\n"
        f"  work: {flops / 1e9:.2f} GFLOP per token, {flops * tokens / 1e12:.2f} TFLOP per step, "
        f"{length} in all"
    )


def look_at_data(config: Config, request: Request) -> None:
    """Open and check the data that is named, as a run does; what is made of it is thrown away. ValueError as there."""
    if config.data.path is None and config.data.sft is None:
        return
    with tempfile.TemporaryDirectory(prefix="megalite-") as scratch:
        config = with_data_tokenizer(config, say)
        elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=scratch))
        data = objective_of(config).open_data(elsewhere, True)
        say(f"data: {data.fingerprint}; one epoch is {len(data.train)} samples")
        with_epochs(config, request, len(data.train), WORLD_SIZE, say)


def with_corpus(config: Config, corpus: Path, request: Request, tuning: bool = False) -> Config:
    """For the preset tiny without data: the committed corpus, or with `tuning` questions on it; prepared once."""
    chosen = config.data.path is not None or config.data.sft is not None or config.model.from_hf is not None
    if chosen or request.preset != "tiny":
        return config
    from megalite.data.corpus import prepare
    from megalite.data.questions import prepare_questions

    cache = Path(config.data.cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        # the first rank to come prepares, the others find it done
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = prepare(corpus, cache, config.model.vocab_size)
        questions = prepare_questions(corpus, cache) if tuning else None
    if questions is not None:
        template = config.data.template or "plain"
        data = dataclasses.replace(
            config.data, sft=str(questions.train), tokenizer=str(found.tokenizer), template=template
        )
        return dataclasses.replace(config, data=data)
    data = dataclasses.replace(
        config.data,
        path=str(found.train),
        valid=config.data.valid or {name: str(prefix) for name, prefix in found.heldout.items()},
        tokenizer=str(found.tokenizer),
    )
    return dataclasses.replace(config, data=data)


def export(config: Config) -> None:
    """Write the finished run as a Hugging Face folder. One rank does it, after the last collective."""
    from megalite.exchange.convert import to_hf_folder

    assert config.train.export_hf is not None
    if RANK == 0:
        target = to_hf_folder(Path(config.train.run_dir), Path(config.train.export_hf))
        say(f"exported {target}" + ("" if find_tokenizer(target) else ", without a tokenizer: none lies with the run"))


def run(config: Config, objective: Objective, data: DataSets, resume: Path | None, mine: Report | None) -> int:
    """Train, and export what was learned if that is asked for; gives the exit status."""
    done = False

    def main(world: World) -> None:
        nonlocal done
        from megalite.run.trainer import train

        done = train(config, objective, data, world, resume).step >= config.train.steps and not config.train.eval_only

    try:
        status = in_world(config, main, mine, Path(config.train.run_dir))
    finally:
        if RANK == 0:
            lock.release(Path(config.train.run_dir))
    if status == 0 and done and config.train.export_hf is not None:
        try:
            export(config)
        except (ValueError, OSError) as error:
            return print_error(describe_error(error))
    return status
