"""One step of any topology beside Hugging Face's model: the cases, the reference, and the comparison in float64.

The reference knows nothing of megalite but the map of names: another library's model on the same weights, its loss by
F.cross_entropy, its gradients by autograd. Every rank of a run is a thread; the engine is the real one.
"""

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from models import tiny
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import Config, ParallelConfig, ResolvedModel, TrainConfig, check, resolve
from megalite.config.shapes import shapes
from megalite.engine.batches import Microbatch
from megalite.engine.engine import build
from megalite.model.layouts import from_hf
from megalite.parallel.cuts import Shard
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

SEQ, BATCH, MICROBATCHES = 12, 2, 4
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Shape:
    """A model, the Hugging Face family that it is one of, and the tp sizes it is cut by."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tps: tuple[int, ...]

    def model(self, tied: bool) -> ResolvedModel:
        return tiny(
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            norm_eps=1e-3,
            rope_theta=100.0,
            tie_embeddings=tied,
            qkv_bias=self.family == "Qwen2",
            qk_norm=self.family == "Qwen3",
        )


# tp 3 cuts three kv groups and 2 cuts two; 4 replicates two, and 2 and 3 the one of mqa
SHAPES = {
    "gqa": Shape("Qwen2", layers=7, heads=6, kv_heads=3, head_dim=4, tps=(1, 3)),
    "qknorm": Shape("Qwen3", layers=4, heads=4, kv_heads=2, head_dim=8, tps=(1, 2, 4)),
    "mqa": Shape("Llama", layers=4, heads=6, kv_heads=1, head_dim=6, tps=(1, 2, 3)),
}


@dataclass(frozen=True)
class Case:
    shape: str
    tp: int = 1
    sp: bool = False
    schedule: str = "1f1b"
    pp: int = 1
    tied: bool = False
    dp: int = 1
    stages: tuple[int, ...] | None = None
    chunks: int = 1
    recompute: str = "none"
    isolated: bool = False
    overlap: bool = True
    zero: int = 0

    def __str__(self) -> str:
        words = [f"tp{self.tp}"] + ["sp"] * self.sp
        words += [self.schedule, f"pp{self.pp}"] if self.pp > 1 or self.schedule != "1f1b" else []
        words += [f"v{self.chunks}"] * (self.chunks > 1) + [self.recompute] * (self.recompute != "none")
        words += [f"dp{self.dp}"] * (self.dp > 1) + ["tied"] * self.tied + [self.shape]
        words += ["stages" + ".".join(map(str, self.stages))] if self.stages else []
        return "-".join(words + ["isolated"] * self.isolated + ["inturn"] * (not self.overlap) + ["zero"] * self.zero)

    def config(self) -> Config:
        parallel = ParallelConfig(
            tp=self.tp,
            pp=self.pp,
            dp=self.dp,
            sp=self.sp,
            schedule=self.schedule,
            stages=self.stages,
            chunks=self.chunks,
            recompute=self.recompute,
            overlap=self.overlap,
            zero=self.zero,
            bucket_mb=0.02,  # several buckets even of these models
        )
        train = TrainConfig(dtype="fp64", seq_len=SEQ, micro_batch_size=BATCH, global_batch_size=BATCH * MICROBATCHES)
        ranks = self.tp * self.pp * self.dp
        config = resolve(Config(model=SHAPES[self.shape].model(self.tied), parallel=parallel, train=train), ranks)
        check(config, ranks)
        return config


@functools.cache
def batches(isolated: bool) -> list[Microbatch]:
    """Ragged loss masks, one of them empty; `isolated`: two or three documents in every sample."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for m in range(MICROBATCHES):
        tokens = torch.randint(0, 101, (BATCH, SEQ + 1), generator=generator)
        mask = (torch.rand(BATCH, SEQ, generator=generator) > 0.3).double()
        if m == 1:
            mask.zero_()
        index = torch.arange(SEQ).expand(BATCH, SEQ)
        starts = torch.zeros(BATCH, SEQ, dtype=torch.long)
        for b in range(BATCH if isolated else 0):
            for start in (1 + m + b, 8 + b):
                starts[b, start:] = start
        bounds = torch.stack([starts, index + 1], -1) if isolated else None
        found.append(Microbatch(tokens[:, :-1], tokens[:, 1:], mask, index - starts, bounds))
    return found


@dataclass(frozen=True)
class Reference:
    """Weights by megalite's names, the summed loss and its gradients."""

    weights: dict[str, Tensor]
    loss: float
    grads: dict[str, Tensor]


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


@functools.cache
def reference(name: str, tied: bool, isolated: bool) -> Reference:
    transformers = pytest.importorskip("transformers")
    shape, c = SHAPES[name], SHAPES[name].model(tied)
    config = getattr(transformers, f"{shape.family}Config")(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.ffn_hidden_size,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=tied,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = getattr(transformers, f"{shape.family}ForCausalLM")(config).double().train()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(rms_norm, module)  # theirs computes in float32
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.2, generator=generator)

    loss = torch.zeros((), dtype=torch.float64)
    for mb in batches(isolated):
        mask = None
        if isolated:
            index = torch.arange(SEQ)
            document = (mb.positions == 0).cumsum(1)
            seen = (document[:, :, None] == document[:, None, :]) & (index[:, None] >= index)
            mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[:, None]
        logits = model(mb.tokens, attention_mask=mask, position_ids=mb.positions, use_cache=False).logits
        assert logits.dtype == torch.float64
        ce = F.cross_entropy(logits.flatten(0, 1), mb.labels.flatten(), reduction="none")
        loss = loss + (ce * mb.loss_mask.flatten()).sum()
    loss.backward()

    def mapped(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
        assert None not in values.values()
        return {key: from_hf(values.__getitem__, key, c) for key in shapes(c)}

    weights = mapped({key: p.detach() for key, p in parameters.items()})
    return Reference(weights, loss.item(), mapped({key: p.grad for key, p in parameters.items()}))


@dataclass(frozen=True)
class Rank:
    """What one rank has after one forward_backward."""

    loss: float
    tokens: float
    shards: dict[str, Shard]
    held: dict[str, range]
    grads: dict[str, Tensor]
    squares: float
    evaluated: float


def play(case: Case, weights: dict[str, Tensor], evaluates: bool) -> list[Rank]:
    config = case.config()

    def main(world: World) -> Rank:
        engine = build(config, world, lambda name, shape: weights[name])
        dp = engine.mesh.dp
        microbatches = batches(case.isolated)[dp.rank :: dp.size]
        loss, tokens = engine.forward_backward(microbatches).values()
        evaluated = engine.evaluate(microbatches)["loss"] if evaluates else loss
        held = {name: engine.grads.held(name) for name in engine.parameters}
        return Rank(loss, tokens, engine.shards, held, engine.grads.reduced, engine.gradient_squares(), evaluated)

    return run_threads(case.tp * case.pp * case.dp, main)


def compare(case: Case, evaluates: bool) -> None:
    """Compare loss, gradients, clip norm and, where it `evaluates`, the evaluation's loss with the reference."""
    expected = reference(case.shape, case.tied, case.isolated)
    ranks = play(case, expected.weights, evaluates)

    loss = sum(rank.loss for rank in ranks)
    assert abs(loss - expected.loss) <= TOLERANCE * expected.loss
    assert sum(rank.tokens for rank in ranks) == sum(mb.loss_mask.sum().item() for mb in batches(case.isolated))
    assert math.isclose(sum(rank.evaluated for rank in ranks), loss, rel_tol=TOLERANCE)

    errors: dict[str, float] = {}
    for rank in ranks:  # every rank's copy of what is replicated, and the zeros of padding
        for name, grad in rank.grads.items():
            whole, held = expected.grads[name], rank.held[name]
            assert whole.abs().max() > 0
            local = rank.shards[name].cut(whole).flatten()[held.start : held.stop]
            assert grad.shape == local.shape
            error = max(((grad - local).abs() / whole.abs().max()).tolist(), default=0.0)
            errors[name] = max(errors.get(name, 0.0), error)
    assert errors.keys() == expected.grads.keys()
    assert {name: error for name, error in errors.items() if not error <= TOLERANCE} == {}

    # the clip norm counts every element once
    squares = sum(grad.square().sum().item() for grad in expected.grads.values())
    assert math.isclose(sum(rank.squares for rank in ranks), squares, rel_tol=TOLERANCE)
