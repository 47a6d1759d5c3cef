"""From a configuration to one rank's engine: the only place where the tables meet.

A stage, its gradient buffers, and the optimizer that updates its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.config import Resolved
from megalite.config.param_groups import check_groups
from megalite.config.parameters import has_kv_rows, is_decayed, is_factor, is_partial
from megalite.engine.batches import Microbatch
from megalite.engine.stage import Stage, build_stage
from megalite.model.decoder import Decoder
from megalite.optim.adamw import AdamW
from megalite.optim.muon import Muon
from megalite.parallel.cuts import Shard, sum_of_squares
from megalite.parallel.grad_buffers import GradBuffers, all_reduce_together
from megalite.parallel.groups import World
from megalite.parallel.mesh import Mesh
from megalite.parallel.param_buffers import ParamBuffers


@dataclass
class Engine(Stage):
    """A stage with gradients and an optimizer, by the same global parameter names.

    buffers: gathers each parameter from the replica that updates it; None: every replica updates all.
    microbatch_losses: of the last forward_backward, on every tp rank of the last stage.
    """

    grads: GradBuffers
    optimizer: AdamW
    buffers: ParamBuffers | None
    microbatch_losses: Sequence[Tensor] = ()

    def forward_backward(self, microbatches: Sequence[Microbatch], loss_scale: float = 1.0) -> dict[str, float]:
        """Compute the gradients of loss_scale · Σ mask · ce over this replica's microbatches.

        They are summed over replicas and left in `grads.reduced`. Returns the `sums` of this replica on one rank of it,
        the last stage's tp rank 0, otherwise zeros.
        """
        self.grads.begin(len(microbatches))
        waiting = set(self.models)

        def reduce(stage: int) -> None:
            # buckets and the small collectives are of the rank, not of a stage
            waiting.remove(stage)
            if not waiting:
                self.reduce_gradients()

        results = self._run(microbatches, True, loss_scale=loss_scale, reduce=reduce)
        self.microbatch_losses = [result["loss"] for result in results]
        return self._totals(results, microbatches)

    def reduce_gradients(self) -> None:
        """Complete the sums of each gradient: over replicas, partial tp gradients, kv replicas, tied ends."""
        self.grads.finish()
        # ranks that sum together hold the same parameters, so their shares match
        reduced, sp = self.grads.reduced, self.config.parallel.sp
        all_reduce_together([g for name, g in reduced.items() if is_partial(name, sp)], self.mesh.tp)
        if self.mesh.kv.size > 1:
            replicated = [
                shard.view(reduced[name], block, self.grads.held(name).start)
                for name, shard in self.shards.items()
                if name in reduced and has_kv_rows(name)
                for block in shard.blocks(self.grads.held(name))
                if block.offset[0] >= shard.pieces[-1].offset
            ]
            all_reduce_together(replicated, self.mesh.kv)
        if self.config.model.tie_embeddings and "embed.weight" in reduced:
            all_reduce_together([reduced["embed.weight"]], self.mesh.embed)

    def gradient_squares(self) -> float:
        """This rank's share of Σ g² over the whole model: every element is counted by one rank of the world."""
        main_grad = self.grads.main_grad
        spans = {name: span for name, span in self.spans().items() if name in main_grad}
        squares = (sum_of_squares(self.shards[name], main_grad[name], span) for name, span in spans.items())
        return float(sum(squares, torch.tensor(0.0)))

    def spans(self) -> dict[str, range]:
        """The elements of each flattened local parameter that this rank counts in norms and writes to checkpoints.

        A tied matrix belongs to the first rank of the pipeline, a frozen parameter to the first replica.
        """
        copy = self.config.model.tie_embeddings and not self.mesh.is_first_stage
        first = self.mesh.group("dp", "cp").rank == 0
        frozen = {n: range(p.numel() if first else 0) for n, p in self.parameters.items()}
        spans = {**frozen, **self.grads.spans}
        return {n: spans[n] for n in self.stored() if not (copy and n == "embed.weight")}

    def stored(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint stores: all, or with LoRA the factors."""
        lora = self.config.tune.mode == "lora"
        return {n: p for n, p in self.parameters.items() if not lora or is_factor(n)}

    def base(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint does not store."""
        stored = self.stored()
        return {n: p for n, p in self.parameters.items() if n not in stored}

    def update(self, lr: float, scale: float) -> None:
        """One optimizer step on the gradients times `scale`."""
        self.grads.scale(scale)
        self.optimizer.step(lr)
        if self.buffers is not None:
            self.buffers.gather()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {parameter name: tensor}} for a checkpoint; kinds such as `weight` and `exp_avg`.

        Weights are whole local tensors; the others may be the part `grads.spans[name]` of the flattened one.
        """
        if self.buffers is not None:
            self.buffers.finish()
        return {"weight": self.stored(), **self.optimizer.state()}


def build(
    config: Resolved,
    world: World,
    value: Callable[[str, tuple[int, ...]], Tensor] | None = None,
    head: str = "next-token",
    decoder: type[Decoder] = Decoder,
) -> Engine:
    """This rank's engine for a resolved, checked `config`; the other arguments as in `build_stage`."""
    m, p = config.model, config.parallel
    chosen = config.shapes.trained
    check_groups(config.optim, [*config.shapes.model, *config.shapes.factors])
    stage = build_stage(config, world, value, head, decoder)
    mesh, models, parameters, shards = stage.mesh, stage.models, stage.parameters, stage.shards
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    active = {name: parameter for name, parameter in parameters.items() if name in chosen}
    # in a bucket of its own a tied matrix has the same shares on both of its stages
    alone = ("embed.weight",) if m.tie_embeddings and mesh.pp.size > 1 else ()
    # both ends of the model on one rank, but in two stages: two backwards a microbatch add to the tied matrix
    twice = {"embed.weight": 2} if m.tie_embeddings and mesh.pp.size == 1 and len(models) > 1 else {}
    grads = GradBuffers(active, mesh.group("dp", "cp"), p.bucket_mb * 2**20, p.overlap, p.zero > 0, alone, twice)
    buffers = None
    if p.zero:
        units = [
            module
            for model in models.values()
            for module in (model.embed, *model.layers.values(), model.loss_head)
            if module is not None
        ]
        buffers = ParamBuffers(active, grads, units)
    optimizer = make_optimizer(config, mesh, active, shards, grads, buffers)
    return Engine(config, mesh, models, parameters, shards, stage.sums, grads, optimizer, buffers)


def make_optimizer(
    config: Resolved,
    mesh: Mesh,
    parameters: dict[str, nn.Parameter],
    shards: dict[str, Shard],
    grads: GradBuffers,
    buffers: ParamBuffers | None,
) -> AdamW:
    """The optimizer named by optim.name over the parameters, or over this rank's shares of them."""
    c, matrices = config.optim, {name for name in parameters if is_decayed(name)}
    updated: Mapping[str, Tensor] = parameters if buffers is None else buffers.shares
    gradients = grads.main_grad if buffers is None else grads.reduced
    if c.name != "muon":
        return AdamW(c, updated, gradients, matrices)
    return Muon(
        c,
        updated,
        gradients,
        matrices,
        hidden=config.shapes.hidden,
        model=config.model,
        shards={name: shards[name] for name in parameters},
        held=grads.held,
        sharded=grads.sharded,
        tp=mesh.tp,
        dp=mesh.group("dp", "cp"),
    )
