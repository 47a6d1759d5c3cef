"""One rank's stages of the cut model, run forward under a schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from megalite.checkpoint.dtypes import to_torch
from megalite.config import Resolved
from megalite.config.dtypes import DTYPES
from megalite.config.parameters import global_name
from megalite.engine.batches import Microbatch
from megalite.model.context import Context
from megalite.model.cut_table import cut_model
from megalite.model.decoder import HEADS, Decoder
from megalite.model.dropout import sample_keys
from megalite.model.init import draw, materialise
from megalite.model.lora import adapt
from megalite.parallel.cuts import Shard
from megalite.parallel.groups import World
from megalite.parallel.mesh import Mesh
from megalite.pipeline.executor import Jobs, Spec, Values, execute
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import Action, forward_only, make_plan, stages_of_rank
from megalite.pipeline.simulate import Costs
from megalite.plan.costs import stage_layers
from megalite.plan.counts import head_flops, layer_flops


@dataclass(frozen=True)
class StageChunk:
    """One stage of this rank over the microbatches of a step, for the executor.

    keys: dropout keys of each microbatch, or None. loss: of the last stage; the summed loss rather than logits.
    """

    model: Decoder
    arriving: tuple[Spec, ...]
    leaving: tuple[Spec, ...]
    microbatches: Sequence[Microbatch]
    keys: Callable[[Microbatch], Tensor | None]
    loss: bool

    def forward(self, microbatch: int, arrived: Values, deferred: Jobs | None) -> Values | dict[str, Tensor]:
        mb, labelled = self.microbatches[microbatch], self.loss and not self.leaving
        out: Tensor | dict[str, Tensor] = self.model(
            arrived[0] if arrived else mb.tokens,
            Context(mb.positions, mb.bounds, self.keys(mb), deferred=deferred),
            mb.labels if labelled else None,
            mb.loss_mask if labelled else None,
        )
        if isinstance(out, dict):
            return out
        return (out,) if self.leaving else {"logits": out}


@dataclass
class Stage:
    """One rank's part of the model, without gradients or optimizer.

    models: the rank's stages by global number. parameters, shards: of all its stages, by global parameter name.
    sums: the names of what the model's head sums over a batch, and `tokens`, the sum of the loss mask.
    """

    config: Resolved
    mesh: Mesh
    models: dict[int, Decoder]
    parameters: dict[str, nn.Parameter]
    shards: dict[str, Shard]
    sums: tuple[str, ...]

    def __post_init__(self) -> None:
        self._plans = cache(self._lowered)

    def _lowered(self, training: bool, num_microbatches: int) -> list[Action]:
        p, ranks = self.config.parallel, self.mesh.pp.size
        plan = (
            make_plan(p.schedule, ranks, num_microbatches, p.chunks)
            if training
            else forward_only(ranks, num_microbatches, p.chunks)
        )
        return lower(plan, stage_costs(self.config))[self.mesh.pp.rank]

    def _run(
        self,
        microbatches: Sequence[Microbatch],
        training: bool,
        *,
        loss: bool = True,
        loss_scale: float = 1.0,
        reduce: Callable[[int], None] | None = None,
    ) -> list[dict[str, Tensor]]:
        """The last stage's results, one per microbatch; [] on the other ranks of the pipeline."""
        c, stages = self.config, self.mesh.pp.size * self.config.parallel.chunks
        drops = training and max(c.model.dropout, c.model.attention_dropout, c.tune.lora_dropout) > 0

        def keys(mb: Microbatch) -> Tensor | None:
            return sample_keys(c.train.seed, mb.samples) if drops and mb.samples is not None else None

        hidden = self._hidden(*microbatches[0].tokens.shape)
        chunks = {}
        for stage, model in self.models.items():
            model.train(training)
            arriving, leaving = (hidden,) if stage > 0 else (), (hidden,) if stage < stages - 1 else ()
            chunks[stage] = StageChunk(model, arriving, leaving, microbatches, keys, loss)
        return execute(
            self._plans(training, len(microbatches)),
            chunks,
            link=self.mesh.link,
            ranks=self.mesh.pp.ranks,
            training=training,
            loss_scale=loss_scale,
            reduce=reduce,
        )

    def _hidden(self, b: int, s: int) -> Spec:
        """Hidden states between stages: [b, s, h], or [b, s/tp, h] under sequence parallelism."""
        c = self.config
        shape = (b, s // self.mesh.tp.size if c.parallel.sp else s, c.model.hidden_size)
        return Spec(shape, to_torch(DTYPES[c.train.dtype]), self.mesh.device)

    def logits(self, tokens: Tensor, positions: Tensor, bounds: Tensor | None) -> Tensor | None:
        """Logits [b, s, vocab] of tokens [b, s], on every tp rank of the last stage; None on the others."""
        # labels and mask are not read
        results = self._run([Microbatch(tokens, tokens, tokens, positions, bounds)], False, loss=False)
        return results[0]["logits"] if self.mesh.is_last_stage else None

    def losses(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Σ mask · ce of each microbatch, on every tp rank of the last stage; [] on the others. No gradients."""
        return [result["loss"] for result in self._run(microbatches, training=False)]

    def evaluate(self, microbatches: Sequence[Microbatch]) -> dict[str, float]:
        """The `sums` of this replica on one rank of it, the last stage's tp rank 0, otherwise zeros. No gradients."""
        return self._totals(self._run(microbatches, training=False), microbatches)

    def _totals(self, results: Sequence[dict[str, Tensor]], microbatches: Sequence[Microbatch]) -> dict[str, float]:
        if not self.mesh.is_last_stage or self.mesh.tp.rank != 0:
            return dict.fromkeys(self.sums, 0.0)
        results = [{**found, "tokens": mb.loss_mask.sum()} for found, mb in zip(results, microbatches, strict=True)]
        return {name: float(torch.stack([each[name] for each in results]).double().sum()) for name in self.sums}


def stage_costs(config: Resolved) -> Costs:
    """Costs of each stage relative to the average one; the head counts as FLOPs."""
    m, seq_len = config.model, config.train.seq_len
    head = head_flops(m) / layer_flops(m, seq_len)
    layers = [float(len(r)) for r in stage_layers(config)]
    layers[-1] += head
    return Costs(stage_factors=tuple(n * len(layers) / sum(layers) for n in layers))


def build_stage(
    config: Resolved,
    world: World,
    value: Callable[[str, tuple[int, ...]], Tensor] | None = None,
    head: str = "next-token",
    decoder: type[Decoder] = Decoder,
) -> Stage:
    """This rank's part of the model of a resolved, checked `config`.

    value(global name, whole shape): the initial whole parameter; default: drawn from train.seed. head: what ends the
    model, a key of HEADS. decoder: the class of the model.
    """
    m, p, t = config.model, config.parallel, config.train
    mesh = Mesh(world, tp=p.tp, pp=p.pp, dp=p.dp, cp=p.cp, kv_replicas=max(1, p.tp // m.num_kv_heads))
    models: dict[int, Decoder] = {}
    parameters: dict[str, nn.Parameter] = {}
    shards: dict[str, Shard] = {}
    layers = stage_layers(config)
    for stage in stages_of_rank(mesh.pp.rank, mesh.pp.size, p.chunks):
        with torch.device("meta"):
            model = models[stage] = decoder(
                m,
                layers[stage],
                first=stage == 0,
                last=stage == len(layers) - 1,
                kernel=t.kernels,
                label_smoothing=config.optim.label_smoothing,
                head=head,
            )
        cut_model(model, m, mesh.tp, p.sp)
        adapt(model, config, mesh.tp)
        model.set_recompute(p.recompute, p.recompute_layers)
        own = materialise(
            model,
            m,
            mesh.tp,
            value or (lambda name, shape: draw(name, shape, m, t.seed)),
            dtype=to_torch(DTYPES[t.dtype]),
            device=mesh.device,
        )
        shards |= {global_name(name, m.tie_embeddings): shard for name, shard in own.items()}
        _share(model, parameters, m.tie_embeddings)
    return Stage(config, mesh, models, parameters, shards, (*HEADS[head].sums, "tokens"))


def _share(model: Decoder, parameters: dict[str, nn.Parameter], tied: bool) -> None:
    """Add the model's parameters by global name; one that another stage of the rank has already is that Parameter."""
    for name, parameter in list(model.named_parameters()):
        shared = parameters.setdefault(global_name(name, tied), parameter)
        if shared is not parameter:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, shared)
