"""From a configuration to one rank's engine: the only place where the tables meet.

mesh, the layers of this rank's stage, the cut model with its weights, the schedule, gradient buffers and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from megalite.config import Config
from megalite.config.param_groups import check_groups
from megalite.config.parameters import global_name, has_kv_rows, is_decayed, is_factor, is_partial
from megalite.config.shapes import shapes
from megalite.config.trained import adapter_shapes, hidden_matrices, trained
from megalite.engine.batches import Microbatch
from megalite.model.context import Context
from megalite.model.cut_table import cut_model
from megalite.model.decoder import Decoder
from megalite.model.dropout import sample_keys
from megalite.model.init import draw, materialise
from megalite.model.lora import adapt
from megalite.optim.adamw import AdamW
from megalite.optim.muon import Muon
from megalite.parallel.cuts import Shard, sum_of_squares
from megalite.parallel.grad_buffers import GradBuffers, all_reduce_together
from megalite.parallel.groups import World
from megalite.parallel.mesh import Mesh
from megalite.parallel.param_buffers import ParamBuffers
from megalite.pipeline.executor import execute
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import Action, forward_only, make_plan
from megalite.pipeline.simulate import Costs
from megalite.plan.costs import stage_layers
from megalite.plan.counts import head_flops, layer_flops

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass
class Stage:
    """One rank's part of the model, for forwards alone. `parameters` and `shards` go by global parameter names."""

    config: Config
    mesh: Mesh
    model: Decoder
    parameters: dict[str, nn.Parameter]
    shards: dict[str, Shard]

    def __post_init__(self) -> None:
        self._plans = cache(self._lowered)

    def _lowered(self, training: bool, num_microbatches: int) -> list[Action]:
        c, stages = self.config, self.mesh.pp.size
        plan = (
            make_plan(c.parallel.schedule, stages, num_microbatches)
            if training
            else forward_only(stages, num_microbatches)
        )
        return lower(plan, stage_costs(c))[self.mesh.pp.rank]

    def _run(
        self,
        microbatches: Sequence[Microbatch],
        training: bool,
        loss_scale: float = 1.0,
        reduce: Callable[[], None] | None = None,
    ) -> list[Tensor]:
        c, last = self.config, self.mesh.is_last_stage
        self.model.train(training)
        drops = training and max(c.model.dropout, c.model.attention_dropout, c.tune.lora_dropout) > 0

        def forward(m: int, x: Tensor | None) -> Tensor:
            mb = microbatches[m]
            keys = sample_keys(c.train.seed, mb.samples) if drops and mb.samples is not None else None
            out: Tensor = self.model(
                mb.tokens if x is None else x,
                Context(mb.positions, mb.bounds, keys),
                mb.labels if last else None,
                mb.loss_mask if last else None,
            )
            return out

        return execute(
            self._plans(training, len(microbatches)),
            forward,
            link=self.mesh.link,
            ranks=self.mesh.pp.ranks,
            hidden=self._hidden(*microbatches[0].tokens.shape),
            training=training,
            loss_scale=loss_scale,
            reduce=reduce,
        )

    def _hidden(self, b: int, s: int) -> Tensor:
        """What travels between stages."""
        c = self.config
        shape = (b, s // self.mesh.tp.size if c.parallel.sp else s, c.model.hidden_size)
        return torch.empty(shape, dtype=DTYPES[c.train.dtype], device=self.mesh.device)

    def logits(self, tokens: Tensor, positions: Tensor, bounds: Tensor | None) -> Tensor | None:
        """Logits [b, s, vocab] of tokens [b, s], on every tp rank of the last stage; None on the others."""
        self.model.eval()
        outputs = execute(
            self._plans(False, 1),
            lambda _, x: self.model(tokens if x is None else x, Context(positions, bounds)),
            link=self.mesh.link,
            ranks=self.mesh.pp.ranks,
            hidden=self._hidden(*tokens.shape),
            training=False,
        )
        return outputs[0] if self.mesh.is_last_stage else None

    def losses(self, microbatches: Sequence[Microbatch]) -> list[Tensor]:
        """Σ mask · ce of each microbatch, on every tp rank of the last stage; [] on the others. No gradients."""
        outputs = self._run(microbatches, training=False)
        return outputs if self.mesh.is_last_stage else []

    def evaluate(self, microbatches: Sequence[Microbatch]) -> tuple[float, float]:
        """(Σ loss, valid tokens) of this replica on one rank of it, the last stage's tp rank 0, else zeros."""
        return self._totals(self.losses(microbatches), microbatches)

    def _totals(self, losses: list[Tensor], microbatches: Sequence[Microbatch]) -> tuple[float, float]:
        if not self.mesh.is_last_stage or self.mesh.tp.rank != 0:
            return 0.0, 0.0
        total = torch.stack(losses).double().sum()
        tokens = torch.stack([mb.loss_mask.sum() for mb in microbatches]).double().sum()
        return float(total), float(tokens)


@dataclass
class Engine(Stage):
    """A stage that learns. Gradients go by global parameter names too.

    `buffers`: where parameters are gathered from the replicas that update them; None: each replica updates all.
    `microbatch_losses`: of the last forward_backward, on every tp rank of the last stage.
    """

    grads: GradBuffers
    optimizer: AdamW
    buffers: ParamBuffers | None
    microbatch_losses: Sequence[Tensor] = ()

    def forward_backward(self, microbatches: Sequence[Microbatch], loss_scale: float = 1.0) -> tuple[float, float]:
        """Gradients of loss_scale · Σ mask · ce over this replica's microbatches.

        They are summed over replicas and left in `grads.reduced`.
        Gives (Σ loss, valid tokens) of this replica on one rank of it, the last stage's tp rank 0, else zeros.
        """
        self.grads.begin(len(microbatches))
        outputs = self._run(microbatches, True, loss_scale, self.reduce_gradients)
        self.microbatch_losses = outputs if self.mesh.is_last_stage else []
        return self._totals(outputs, microbatches)

    def reduce_gradients(self) -> None:
        """Finish all sums that a gradient is owed: replicas, partial tp gradients, kv replicas, tied ends."""
        self.grads.finish()
        # ranks that share a sum hold alike parameters, so their shares of them are alike too
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
        """The elements of each flattened local parameter that this rank answers for in norms and checkpoints.

        A tied matrix belongs to the first stage: the last one's copy is not among them. What is not trained belongs to
        the first replica.
        """
        copy = self.config.model.tie_embeddings and not self.mesh.is_first_stage
        first = self.mesh.group("dp", "cp").rank == 0
        frozen = {n: range(p.numel() if first else 0) for n, p in self.parameters.items()}
        spans = {**frozen, **self.grads.spans}
        return {n: spans[n] for n in self.stored() if not (copy and n == "embed.weight")}

    def stored(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint keeps: all, or with LoRA the factors, beside a base that stays as it is."""
        lora = self.config.tune.mode == "lora"
        return {n: p for n, p in self.parameters.items() if not lora or is_factor(n)}

    def base(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint does not keep."""
        stored = self.stored()
        return {n: p for n, p in self.parameters.items() if n not in stored}

    def update(self, lr: float, scale: float) -> None:
        """One optimizer step on the gradients times `scale`."""
        self.grads.scale(scale)
        self.optimizer.step(lr)
        if self.buffers is not None:
            self.buffers.gather()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {parameter name: tensor}} of what a checkpoint keeps, kinds as `weight` and `exp_avg`.

        Weights are whole local tensors; the others may be the part `grads.spans[name]` of the flattened one.
        """
        if self.buffers is not None:
            self.buffers.finish()
        return {"weight": self.stored(), **self.optimizer.state()}


def stage_costs(config: Config) -> Costs:
    """How long a stage's forward takes beside an average one's, for the schedule."""
    m, seq_len = config.model, config.train.seq_len
    head = head_flops(m) / layer_flops(m, seq_len)
    layers = [float(len(r)) for r in stage_layers(config)]
    layers[-1] += head
    return Costs(stage_factors=tuple(n * len(layers) / sum(layers) for n in layers))


def build_stage(config: Config, world: World, value: Callable[[str, tuple[int, ...]], Tensor] | None = None) -> Stage:
    """This rank's part of the model of a resolved, checked `config`.

    `value(global name, whole shape)` gives the initial whole parameter; default: drawn from train.seed.
    """
    m, p, t = config.model, config.parallel, config.train
    assert None not in (p.tp, p.pp, p.dp, m.num_kv_heads), "resolve the configuration first"
    assert p.tp is not None
    assert p.pp is not None
    assert p.dp is not None
    assert m.num_kv_heads is not None
    mesh = Mesh(world, tp=p.tp, pp=p.pp, dp=p.dp, cp=p.cp, kv_replicas=max(1, p.tp // m.num_kv_heads))
    with torch.device("meta"):
        model = Decoder(
            m,
            stage_layers(config)[mesh.pp.rank],
            first=mesh.is_first_stage,
            last=mesh.is_last_stage,
            kernel=t.kernels,
            label_smoothing=config.optim.label_smoothing,
        )
    cut_model(model, m, mesh.tp, p.sp)
    adapt(model, config, mesh.tp)
    model.set_recompute(p.recompute, p.recompute_layers)
    shards = materialise(
        model,
        m,
        mesh.tp,
        value or (lambda name, shape: draw(name, shape, m, t.seed)),
        dtype=DTYPES[t.dtype],
        device=mesh.device,
    )
    parameters = {global_name(name, m.tie_embeddings): parameter for name, parameter in model.named_parameters()}
    shards = {global_name(name, m.tie_embeddings): shard for name, shard in shards.items()}
    return Stage(config, mesh, model, parameters, shards)


def build(config: Config, world: World, value: Callable[[str, tuple[int, ...]], Tensor] | None = None) -> Engine:
    """This rank's engine for a resolved, checked `config`; `value` as in `build_stage`."""
    m, p = config.model, config.parallel
    chosen = trained(config)
    check_groups(config.optim, [*shapes(m), *adapter_shapes(config)])
    stage = build_stage(config, world, value)
    mesh, model, parameters, shards = stage.mesh, stage.model, stage.parameters, stage.shards
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    active = {name: parameter for name, parameter in parameters.items() if name in chosen}
    # in a bucket of its own a tied matrix has the same shares on both of its stages
    alone = ("embed.weight",) if m.tie_embeddings and mesh.pp.size > 1 else ()
    grads = GradBuffers(active, mesh.group("dp", "cp"), p.bucket_mb * 2**20, p.overlap, p.zero > 0, alone)
    buffers = None
    if p.zero:
        ends = [module for module in (model.embed, model.loss_head) if module is not None]
        buffers = ParamBuffers(active, grads, [*ends, *model.layers.values()])
    optimizer = make_optimizer(config, mesh, active, shards, grads, buffers)
    return Engine(config, mesh, model, parameters, shards, grads, optimizer, buffers)


def make_optimizer(
    config: Config,
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
        hidden=hidden_matrices(config),
        model=config.model,
        shards={name: shards[name] for name in parameters},
        held=grads.held,
        sharded=grads.sharded,
        tp=mesh.tp,
        dp=mesh.group("dp", "cp"),
    )
