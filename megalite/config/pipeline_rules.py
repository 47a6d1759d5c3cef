"""What a pipeline schedule asks of stages and microbatches. Each rule returns '', or a message with its remedy.

The checks raise these messages; the search for a topology leaves out what breaks a rule.
"""

from __future__ import annotations

from megalite.config.resolved import Resolved
from megalite.config.schedules import SCHEDULES, nearest
from megalite.config.schema import MOST_BATCH
from megalite.config.values import shown

PLAIN = "parallel.schedule=1f1b parallel.chunks=1"


def pipeline_fault(config: Resolved) -> str:
    """The first rule of this file that a resolved `config` breaks."""
    return stage_fault(config) or microbatch_fault(config)


def stage_fault(config: Resolved) -> str:
    """Whether the schedule takes parallel.chunks, and the model has a layer for each stage."""
    m, p = config.model, config.parallel
    if p.schedule not in SCHEDULES:
        near = nearest(p.schedule)
        hint = f"; did you mean {near}?" if near else ""
        return f"parallel.schedule={shown(p.schedule)}: must be one of {', '.join(SCHEDULES)}{hint}"
    chunked = " or ".join(name for name, row in SCHEDULES.items() if row.chunked)
    if p.chunks > 1 and not SCHEDULES[p.schedule].chunked:
        return (
            f"parallel.chunks={p.chunks} needs parallel.schedule={chunked}, not {p.schedule}; use that, or "
            f"parallel.chunks=1"
        )
    if p.chunks == 1 and SCHEDULES[p.schedule].chunked:
        return (
            f"parallel.schedule={p.schedule} needs several stages on each rank, parallel.chunks is 1; use "
            f"parallel.chunks=2 or more, or parallel.schedule=1f1b"
        )
    stages = p.pp * p.chunks
    if stages > m.num_layers:
        name, remedy = f"parallel.pp={p.pp} stages", f"use parallel.pp={m.num_layers} or less"
        if p.chunks > 1:
            name, most = f"parallel.pp={p.pp} x parallel.chunks={p.chunks} = {stages} stages", m.num_layers // p.pp
            remedy = f"use parallel.chunks={most}" + (" or less" if most > 2 else "") if most > 1 else f"use {PLAIN}"
        return f"{name} need at least {stages} layers, model.num_layers={m.num_layers}; {remedy}"
    if p.stages is not None and len(p.stages) != stages:
        ranks = f"parallel.pp={p.pp}" + (f" x parallel.chunks={p.chunks}" if p.chunks > 1 else "")
        return f"parallel.stages={list(p.stages)} names {len(p.stages)} stages, {ranks}; make them equal"
    if p.stages is not None and sum(p.stages) != m.num_layers:
        return (
            f"parallel.stages={list(p.stages)} adds up to {sum(p.stages)}, model.num_layers={m.num_layers}; make them "
            f"equal"
        )
    return ""


def microbatch_fault(config: Resolved) -> str:
    """Whether each step has as many microbatches as the schedule runs at a time, or a multiple."""
    p, t = config.parallel, config.train
    if not SCHEDULES[p.schedule].chunked or p.pp == 1:
        return ""
    rule = f"parallel.schedule={p.schedule} needs a multiple of parallel.pp={p.pp} microbatches in each step"
    if t.ramp_samples:
        return (
            f"{rule}, and train.ramp_samples={t.ramp_samples} grows the batch by one at a time; use "
            f"train.ramp_start=0 train.ramp_samples=0, or {PLAIN}"
        )
    unit = t.micro_batch_size * p.dp
    group, size = unit * p.pp, t.global_batch_size
    if size % group == 0:
        return ""
    sizes = [str(n) for n in (size // group * group, -(-size // group) * group) if 0 < n <= MOST_BATCH]
    remedy = f"use train.global_batch_size={' or '.join(sizes)}" if sizes else f"use {PLAIN}"
    return (
        f"{rule}, and train.global_batch_size={size} / (train.micro_batch_size={t.micro_batch_size} x dp {p.dp}) is "
        f"{size / unit:g}; {remedy}"
    )
