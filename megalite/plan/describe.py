"""The plan of a run as text, printed before it starts: mesh, stages, memory, work. By arithmetic alone."""

from __future__ import annotations

from megalite.config import Resolved
from megalite.config.batch import total_samples
from megalite.pipeline.forecast import bubble
from megalite.plan.costs import stage_layers
from megalite.plan.counts import run_flops
from megalite.plan.topology import Machine, memory_table


def describe(config: Resolved, machine: Machine) -> str:
    """The plan in a few lines: stages, batch, memory, work."""
    p, t = config.parallel, config.train
    layers = stage_layers(config)
    # a rank with several stages holds every pp-th of them
    stages = ", ".join("+".join(f"{len(r)}" for r in layers[rank :: p.pp]) for rank in range(p.pp))
    microbatches = t.global_batch_size // (t.micro_batch_size * p.dp)
    tokens = t.global_batch_size * t.seq_len
    flops = run_flops(config)
    # how many steps an epoch has is not known before the data are read
    length = f"{total_samples(t, p.dp) * t.seq_len / 1e6:.1f}e6 tokens" if t.epochs is None else f"{t.epochs:g} epochs"
    return (
        f"plan:\n"
        f"  mesh: pp {p.pp} x dp {p.dp} x cp {p.cp} x tp {p.tp}, sequence parallel {'on' if p.sp else 'off'}\n"
        f"  layers by {'stage' if p.chunks == 1 else 'rank and stage'}: {stages}; {p.schedule}, {microbatches} "
        f"microbatches, bubble {bubble(p.schedule, p.pp, microbatches, p.chunks):.1%}\n"
        f"{memory_table(config, machine)}\n"
        f"  work: {flops / 1e9:.2f} GFLOP per token, {flops * tokens / 1e12:.2f} TFLOP per step, "
        f"{length} in all"
    )
