"""What the scripts in examples/ call: command line to finished run, every mistake told in one line.

All that can be wrong without torch is looked for before torch is imported.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path

from megalite import plan
from megalite.agree import Report, report
from megalite.checkpoint import lock
from megalite.checkpoint.folder import read_manifest
from megalite.config import Config, ConfigError, Request, check, parse_command_line, resolve, to_yaml
from megalite.config.batch import total_samples
from megalite.hf.keys import check_hf, context_warning, with_hf
from megalite.loaded import settle, with_loaded, with_template
from megalite.request import (
    apart,
    one_length,
    resume_from,
    take_run_folder,
    with_added_tokens,
    with_curve,
    with_data_tokenizer,
    with_epochs,
    with_tokenizer,
)
from megalite.together import (
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
)
from megalite.watch.metrics import require_tensorboard

if typing.TYPE_CHECKING:
    from megalite.data.sets import DataSets
    from megalite.parallel.groups import World


def say(text: str) -> None:
    if RANK == 0:
        print(text, flush=True)


def pretrain(argv: Sequence[str], *, default_preset: str, corpus: Path, tuning: bool = False) -> int:
    """Run `examples/pretrain_7b.py`, or with `tuning` `examples/sft_7b.py`; gives the exit status.

    `corpus`: what the preset tiny learns from by itself.
    """
    hear_signals()
    # which kernel and which reader were chosen is said once, by one rank
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    logging.getLogger("megalite").setLevel(logging.INFO if RANK == 0 else logging.WARNING)
    try:
        request = understand(argv, default_preset, tuning)
        config, why = configure(request)
        if request.print_config:
            say(to_yaml(config).rstrip())
            return 0
        name = request.preset or "model" if config.model.from_hf is None else Path(config.model.from_hf).name
        say(f"{name}: {plan.parameters(config.model) / 1e6:.1f}e6 parameters, {why}")
        if config.tune.mode != "full" or config.tune.freeze:
            say(plan.describe_trained(config))
        if config.optim.name == "muon":
            say(plan.describe_muon(config))
        if warning := context_warning(config):
            say(warning)
        need = plan.check_memory(config, WORLD_SIZE, LOCAL_RANKS)
        if request.dry_run:
            say(to_yaml(config) + describe(config, need))
            if RANK == 0:
                look_at_data(config, request)
            return 0
        if RANK == 0:
            lock.require_free(Path(config.train.run_dir))
        if config.log.tensorboard:
            require_tensorboard()
        if not HERE.master:
            raise ConfigError(
                f"srun started {WORLD_SIZE} ranks on several nodes and MASTER_ADDR is not set: before srun, "
                f'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
            )
        config = with_corpus(config, corpus, request, tuning)
        if tuning and config.data.sft is None:
            raise ConfigError(
                "data.sft is not set: which conversations should the model learn from? e.g. data.sft=chats.jsonl "
                "data.tokenizer=tokenizer.json checkpoint.load=runs/llama2-7b"
            )
        from megalite.data.sets import open_data

        config = with_data_tokenizer(config, say)
        data = open_data(config, scan=RANK == 0)
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
    return run(config, data, resume, mine)


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


def look_at_data(config: Config, request: Request) -> None:
    """Open and check the data that is named, as a run does; what is made of it is thrown away. ValueError as there."""
    from megalite.data.sets import open_data

    if config.data.path is None and config.data.sft is None:
        return
    with tempfile.TemporaryDirectory(prefix="megalite-") as scratch:
        config = with_data_tokenizer(config, say)
        data = open_data(dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=scratch)))
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
    from megalite.hf.convert import to_hf_folder

    assert config.train.export_hf is not None
    if RANK == 0:
        say(f"exported {to_hf_folder(Path(config.train.run_dir), Path(config.train.export_hf))}")


def run(config: Config, data: DataSets, resume: Path | None, mine: Report | None) -> int:
    """Train, and export what was learned if that is asked for; gives the exit status."""
    done = False

    def main(world: World) -> None:
        nonlocal done
        from megalite.trainer import train

        done = train(config, data, world, resume).step >= config.train.steps and not config.train.eval_only

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
