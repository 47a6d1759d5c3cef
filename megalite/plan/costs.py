"""What a configuration costs, by arithmetic alone: parameters, FLOPs, bytes per rank, layers per stage.

No torch here: the answer comes before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from megalite.config import Config, ModelConfig, TuneConfig
from megalite.config.trained import adapter_shapes, hidden_matrices, shapes, trained
from megalite.plan.activations import BYTES, stage_activation_bytes

GIB = 2**30
# torch, its allocator's slack and the communicators of one rank
OVERHEAD_BYTES = {"cuda": int(2.5 * GIB), "cpu": int(0.4 * GIB)}


def layer_parameters(m: ModelConfig) -> int:
    """Parameters of one transformer block."""
    assert m.num_kv_heads is not None
    assert m.head_dim is not None
    width, qkv = m.num_heads * m.head_dim, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    biases = qkv if m.qkv_bias or m.linear_bias else 0
    if m.linear_bias:
        biases += 2 * m.hidden_size + (_ffn_matrices(m) - 1) * m.ffn_hidden_size
    norms = 2 * _norm_parameters(m) + (2 * m.head_dim if m.qk_norm else 0)
    return m.hidden_size * (qkv + width + _ffn_matrices(m) * m.ffn_hidden_size) + biases + norms


def _ffn_matrices(m: ModelConfig) -> int:
    return 3 if m.gated else 2


def _norm_parameters(m: ModelConfig) -> int:
    return m.hidden_size * (2 if m.norm == "layernorm" else 1)


def _position_parameters(m: ModelConfig) -> int:
    return (m.max_positions or 0) * m.hidden_size if m.position == "learned" else 0


def parameters(m: ModelConfig) -> int:
    """Parameters of the whole model; tied weights count once."""
    ends = m.vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2) + _norm_parameters(m)
    return m.num_layers * layer_parameters(m) + ends + _position_parameters(m)


def trained_parameters(config: Config) -> int:
    """Parameters of the whole model, adapters among them, that are trained."""
    return sum(math.prod(shape) for shape in trained(config).values())


def describe_trained(config: Config) -> str:
    """How many parameters are trained, of how many."""
    some = trained_parameters(config)
    every = parameters(config.model) + sum(math.prod(shape) for shape in adapter_shapes(config).values())
    return (
        f"tune.mode={config.tune.mode} trains {some / 1e6:.4g}e6 of {every / 1e6:.1f}e6 parameters ({some / every:.2%})"
    )


def describe_muon(config: Config) -> str:
    """How many parameters Muon updates, and how many are left to AdamW."""
    hidden, every = set(hidden_matrices(config)), trained(config)
    sizes = {True: 0, False: 0}
    for name, shape in every.items():
        sizes[name in hidden] += math.prod(shape)
    return (
        f"optim.name=muon: Muon updates {sizes[True] / 1e6:.4g}e6 parameters in {len(hidden)} matrices, "
        f"AdamW the other {sizes[False] / 1e6:.4g}e6"
    )


def layer_flops(m: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of one block per token; of the s x s scores those count that a causal query sees."""
    assert m.num_kv_heads is not None
    assert m.head_dim is not None
    width, qkv = m.num_heads * m.head_dim, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    window = min(m.sliding_window or seq_len, seq_len)
    seen = window - window * window / (2 * seq_len)
    return 2.0 * m.hidden_size * (qkv + width + _ffn_matrices(m) * m.ffn_hidden_size) + 4.0 * seen * width


def head_flops(m: ModelConfig) -> float:
    """Forward FLOPs of the output head per token."""
    return 2.0 * m.hidden_size * m.vocab_size


def training_flops(m: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token: three times the forward (Narayanan et al. 2021, appendix)."""
    return 3 * (m.num_layers * layer_flops(m, seq_len) + head_flops(m))


def run_flops(config: Config) -> float:
    """FLOPs of forward and backward per token of this run: the weight gradient of a frozen matrix is not computed."""
    m, named = config.model, _named(config.model, config.tune)
    chosen, factors = named["trained"], named["factors"]
    # a row of an embedding is looked up; where it is tied it is the head's too
    looked_up = ("pos_embed.weight",) if m.tie_embeddings else ("pos_embed.weight", "embed.weight")
    frozen = sum(
        math.prod(s) for n, s in named["model"].items() if len(s) == 2 and n not in chosen and n not in looked_up
    )
    return training_flops(m, config.train.seq_len) - 2 * frozen + 6 * sum(math.prod(s) for s in factors.values())


def stage_layers(config: Config) -> list[range]:
    """The layers of each pipeline stage: parallel.stages, or cut so that the slowest stage is as fast as can be.

    The output head counts for what it costs in layers; of equally good cuts the most even one is taken.
    """
    m, p = config.model, config.parallel
    assert p.pp is not None
    counts = p.stages or _balanced(m.num_layers, p.pp, head_flops(m) / layer_flops(m, config.train.seq_len))
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


# of LoRA's factors, those that each tp rank has a part of
_CUT_FACTOR = re.compile(r"layers\.\d+\.(attn\.(qkv\.\w+\.b|out\.\w+\.a)|mlp\.((gate_up|up)\.\w+\.b|down\.\w+\.a))")


@dataclass(frozen=True)
class _Elements:
    """Elements of parameters that a tp rank holds: `before[i]` those of all layers before i, and of both ends."""

    before: tuple[int, ...]
    first: int
    last: int
    tied: int

    def on(self, stage: int, stages: int, layers: range) -> int:
        ends = self.first * (stage == 0) + (self.last + self.tied * (stage > 0)) * (stage == stages - 1)
        return self.before[layers.stop] - self.before[layers.start] + ends


@lru_cache(maxsize=256)
def _elements(model: ModelConfig, tune: TuneConfig, tp: int, of: str) -> _Elements:
    """Of the parameters that are trained, or with of="factors" of LoRA's factors. Each is counted once, not a stage."""
    named = _named(model, tune)[of]
    layers, first, last, tied = [0] * model.num_layers, 0, 0, 0
    for name, shape in named.items():
        unit, _, rest = name.partition(".")
        alone = unit == "pos_embed" or (".lora_" in name and not _CUT_FACTOR.fullmatch(name))
        held = math.prod(shape) // (1 if alone else tp)
        if unit == "layers":
            layers[int(rest.partition(".")[0])] += held
        elif unit == "loss_head":
            last += held
        else:
            first += held
            tied += held if unit == "embed" and model.tie_embeddings else 0
    return _Elements((0, *accumulate(layers)), first, last, tied)


@lru_cache(maxsize=8)
def _named(model: ModelConfig, tune: TuneConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """What `trained` and `adapter_shapes` give, kept while topologies are compared: neither depends on them."""
    config = Config(model=model, tune=tune)
    return {"trained": trained(config), "factors": adapter_shapes(config), "model": shapes(model)}


def stage_memory(config: Config, device: str) -> list[Memory]:
    """Bytes per rank of a resolved configuration, by pipeline stage."""
    m, p, t = config.model, config.parallel, config.train
    assert p.tp is not None
    assert p.pp is not None
    assert p.dp is not None
    microbatches = max(1, t.global_batch_size // (t.micro_batch_size * p.dp))
    element, wide = BYTES[t.dtype], max(4, BYTES[t.dtype])
    masters = wide if element < wide else 0
    named = _named(m, config.tune)
    chosen = named["trained"]
    everything = chosen.keys() == named["model"].keys()
    factors, some = (_elements(m, config.tune, p.tp, of) for of in ("factors", "trained"))
    # in half precision a gradient stands beside the fp32 one until it is added; the largest is the embedding's
    uses = 2 if m.tie_embeddings and p.pp == 1 else 1
    ends_trained = any(n in chosen for n in ("embed.weight", "loss_head.head.weight"))
    found = []
    for stage, layers in enumerate(stage_layers(config)):
        ends = (stage == 0) + (stage == p.pp - 1 and not (m.tie_embeddings and p.pp == 1))
        local = (len(layers) * layer_parameters(m) + ends * m.vocab_size * m.hidden_size) // p.tp
        local += _position_parameters(m) * (stage == 0) + factors.on(stage, p.pp, layers)
        updated = local if everything else some.on(stage, p.pp, layers)
        live = microbatches if p.schedule == "gpipe" else min(p.pp - stage, microbatches)
        last = stage == p.pp - 1
        # logits, and their softmax in fp32 with one temporary
        logits = t.micro_batch_size * t.seq_len * -(-m.vocab_size // p.tp) * (element + 2 * wide) if last else 0
        passing = uses * m.vocab_size * m.hidden_size * element // p.tp if masters and ends and ends_trained else 0
        found.append(
            Memory(
                weights=local * element,
                gradients=updated * wide + passing,
                optimizer=updated * (2 * wide + masters) // (p.dp if p.zero else 1),
                activations=stage_activation_bytes(config, len(layers), live),
                logits=logits,
                overhead=OVERHEAD_BYTES[device],
            )
        )
    return found


def memory(config: Config, device: str) -> Memory:
    """Bytes per rank of a resolved configuration, for the rank that needs most."""
    return max(stage_memory(config, device), key=lambda need: need.total)
