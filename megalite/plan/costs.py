"""What a topology costs, by arithmetic alone: layers per stage, bytes per rank.

No torch here: the answer comes before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from megalite.config import Resolved, ResolvedModel, TuneConfig
from megalite.config.dtypes import DTYPES
from megalite.config.parameters import TABLE, Row, row_of, split_layer
from megalite.config.schedules import SCHEDULES
from megalite.config.shapes import local_shape
from megalite.config.trained import named_shapes
from megalite.pipeline.forecast import peak_bytes
from megalite.pipeline.schedule import stages_of_rank
from megalite.plan.activations import deferred_bytes, recompute_bytes, stage_activation_bytes
from megalite.plan.counts import head_flops, layer_flops

GIB = 2**30
# torch, its allocator's slack and the communicators of one rank
OVERHEAD_BYTES = {"cuda": int(2.5 * GIB), "cpu": int(0.4 * GIB)}


def stage_layers(config: Resolved) -> list[range]:
    """The layers of each of pp x chunks stages: parallel.stages, or cut so that the slowest stage is as fast as can be.

    The output head counts for what it costs in layers; of equally good cuts the most even one is taken.
    """
    m, p = config.model, config.parallel
    counts = p.stages or _balanced(m.num_layers, p.pp * p.chunks, head_flops(m) / layer_flops(m, config.train.seq_len))
    starts = [0, *accumulate(counts)]
    return [range(a, b) for a, b in pairwise(starts)]


def _balanced(layers: int, stages: int, head: float) -> tuple[int, ...]:
    """Counts with the least largest cost, then the most even, then the fewest layers first."""
    rest = stages - 1
    if not rest:
        return (layers,)

    def cost(last: int) -> tuple[float, float, int]:
        each, more = divmod(layers - last, rest)
        squares = (rest - more) * each**2 + more * (each + 1) ** 2
        return max(last + head, each + (more > 0)), squares + (last + head) ** 2, -last

    # the stages without the head are alike, so the count of the last one says all
    last = min(range(1, layers - rest + 1), key=cost)
    each, more = divmod(layers - last, rest)
    return (each,) * (rest - more) + (each + 1,) * more + (last,)


@dataclass(frozen=True)
class Memory:
    """Bytes that the fullest rank needs, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def table(self) -> str:
        kinds = ", ".join(f"{k} {v / GIB:.2f}" for k, v in dataclasses.asdict(self).items())
        return f"{self.total / GIB:.2f} GiB ({kinds})"


@dataclass(frozen=True)
class _Elements:
    """Elements of parameters that a tp rank holds: `before[i]` those of all layers before i, and of both ends."""

    before: tuple[int, ...]
    first: int
    last: int
    tied: int

    def on(self, rank: int, ranks: int, layers: Sequence[range]) -> int:
        """On one pipeline rank, whose stages have these layers."""
        ends = self.first * (rank == 0) + (self.last + self.tied * (rank > 0)) * (rank == ranks - 1)
        return sum(self.before[r.stop] - self.before[r.start] for r in layers) + ends


@lru_cache(maxsize=256)
def _elements(model: ResolvedModel, tune: TuneConfig, tp: int, of: str) -> _Elements:
    """Of the parameters that `NamedShapes` calls model, factors, trained or hidden.

    Each is counted once, not for every stage: a plan compares many topologies of up to 1,000 layers.
    """
    layers, ends = [0] * model.num_layers, {"first": 0, "last": 0}
    tied, heads = 0, {row.tied for row in TABLE if row.tied and model.tie_embeddings}
    held: dict[str, tuple[Row, int]] = {}
    for name in getattr(named_shapes(model, tune), of):
        layer, kind = split_layer(name)
        if kind not in held:
            row = row_of(name)
            held[kind] = row, math.prod(local_shape(row, model, tp, rank=tune.lora_rank))
        row, count = held[kind]
        if layer is not None:
            layers[layer] += count
            continue
        ends[row.where] += count
        tied += count if name in heads else 0
    return _Elements((0, *accumulate(layers)), ends["first"], ends["last"], tied)


def rank_memory(config: Resolved, device: str) -> list[Memory]:
    """Bytes per rank of a resolved configuration, by pipeline rank; a rank's stages are summed."""
    m, p, t = config.model, config.parallel, config.train
    microbatches = max(1, t.global_batch_size // (t.micro_batch_size * p.dp))
    element, wide = DTYPES[t.dtype].bytes, DTYPES[DTYPES[t.dtype].wide].bytes
    masters = wide if element < wide else 0
    chosen = config.shapes.trained
    model, factors, some, hidden = (
        _elements(m, config.tune, p.tp, of) for of in ("model", "factors", "trained", "hidden")
    )
    # in half precision a gradient stands beside the fp32 one until it is added; the largest is the embedding's
    uses = 2 if m.tie_embeddings and p.pp == 1 else 1
    ends_trained = any(n in chosen for n in ("embed.weight", "loss_head.head.weight"))
    stages, activations, found = stage_layers(config), _peak_activations(config, microbatches), []
    for rank in range(p.pp):
        layers = [stages[stage] for stage in stages_of_rank(rank, p.pp, p.chunks)]
        last = rank == p.pp - 1
        ends = (rank == 0) + (last and not (m.tie_embeddings and p.pp == 1))
        local = model.on(rank, p.pp, layers) + factors.on(rank, p.pp, layers)
        updated = some.on(rank, p.pp, layers)
        # AdamW has two moments, Muon one momentum
        moments = 2 * updated - (hidden.on(rank, p.pp, layers) if config.optim.name == "muon" else 0)
        # logits, and their softmax in fp32 with one temporary
        logits = t.micro_batch_size * t.seq_len * -(-m.vocab_size // p.tp) * (element + 2 * wide) if last else 0
        passing = uses * m.vocab_size * m.hidden_size * element // p.tp if masters and ends and ends_trained else 0
        found.append(
            Memory(
                weights=local * element,
                gradients=updated * wide + passing,
                optimizer=(moments * wide + updated * masters) // (p.dp if p.zero else 1),
                activations=activations[rank],
                logits=logits,
                overhead=OVERHEAD_BYTES[device],
            )
        )
    return found


def _peak_activations(config: Resolved, microbatches: int) -> list[int]:
    """Bytes of activations that each pipeline rank keeps when it keeps most."""
    p, layers = config.parallel, [len(r) for r in stage_layers(config)]
    whole = [stage_activation_bytes(config, n) for n in layers]
    kept = [0] * len(layers)
    if SCHEDULES[p.schedule].splits:
        kept = [deferred_bytes(config, n, stage == len(layers) - 1) for stage, n in enumerate(layers)]
    peaks = peak_bytes(p.schedule, p.pp, microbatches, p.chunks, whole, kept)
    return [peak + recompute_bytes(config) for peak in peaks]


def memory(config: Resolved, device: str) -> Memory:
    """Bytes per rank of a resolved configuration, for the rank that needs most."""
    return max(rank_memory(config, device), key=lambda need: need.total)
