"""What a configuration costs, by arithmetic alone: parameters, FLOPs, bytes per rank, layers per stage, topology.

No torch here: the answer comes before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from megalite.activations import BYTES, stage_activation_bytes
from megalite.config import Config, ConfigError, ModelConfig, resolve
from megalite.config.check import valid_tp
from megalite.config.tune import adapter_shapes, hidden_matrices, shapes, trained

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
    m, chosen, factors = config.model, trained(config), adapter_shapes(config)
    # a row of an embedding is looked up; where it is tied it is the head's too
    looked_up = ("pos_embed.weight",) if m.tie_embeddings else ("pos_embed.weight", "embed.weight")
    frozen = sum(math.prod(s) for n, s in shapes(m).items() if len(s) == 2 and n not in chosen and n not in looked_up)
    return training_flops(m, config.train.seq_len) - 2 * frozen + 6 * sum(math.prod(s) for s in factors.values())


def stage_layers(config: Config) -> list[range]:
    """The layers of each pipeline stage: parallel.stages, or cut so that the slowest stage is as fast as can be.

    The output head counts for what it costs in layers; of equally good cuts the most even one is taken.
    """
    m, p = config.model, config.parallel
    assert p.pp is not None
    counts = p.stages or _balanced(m.num_layers, p.pp, head_flops(m) / layer_flops(m, config.train.seq_len))
    starts = [sum(counts[:i]) for i in range(p.pp + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def _balanced(layers: int, stages: int, head: float) -> tuple[int, ...]:
    @cache
    def best(left: int, stage: int) -> tuple[float, float, tuple[int, ...]]:
        if stage == stages - 1:
            cost = left + head
            return cost, cost * cost, (left,)
        found = []
        for take in range(1, left - (stages - stage - 1) + 1):
            worst, squares, rest = best(left - take, stage + 1)
            found.append((max(worst, take), squares + take * take, (take, *rest)))
        return min(found)

    return best(layers, 0)[2]


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


def _on_stage(config: Config, stage: int, layers: range, named: Mapping[str, tuple[int, ...]]) -> int:
    """How many of the elements of the parameters `named` a tp rank of this stage holds."""
    p = config.parallel
    assert p.tp is not None
    assert p.pp is not None
    last, total = stage == p.pp - 1, 0
    for name, shape in named.items():
        unit, _, rest = name.partition(".")
        here = {"layers": rest.split(".")[0] in map(str, layers), "loss_head": last}.get(unit, stage == 0)
        here = here or (last and config.model.tie_embeddings and unit == "embed")
        alone = unit == "pos_embed" or (".lora_" in name and not _CUT_FACTOR.fullmatch(name))
        total += here * math.prod(shape) // (1 if alone else p.tp)
    return total


def memory(config: Config, device: str) -> Memory:
    """Bytes per rank of a resolved configuration, for the rank that needs most."""
    m, p, t = config.model, config.parallel, config.train
    assert p.tp is not None
    assert p.pp is not None
    assert p.dp is not None
    microbatches = max(1, t.global_batch_size // (t.micro_batch_size * p.dp))
    element, wide = BYTES[t.dtype], max(4, BYTES[t.dtype])
    masters = wide if element < wide else 0
    chosen, factors = trained(config), adapter_shapes(config)
    everything = chosen.keys() == shapes(m).keys()
    candidates = []
    for stage, layers in enumerate(stage_layers(config)):
        ends = (stage == 0) + (stage == p.pp - 1 and not (m.tie_embeddings and p.pp == 1))
        local = (len(layers) * layer_parameters(m) + ends * m.vocab_size * m.hidden_size) // p.tp
        local += _position_parameters(m) * (stage == 0) + _on_stage(config, stage, layers, factors)
        updated = local if everything else _on_stage(config, stage, layers, chosen)
        live = microbatches if p.schedule == "gpipe" else min(p.pp - stage, microbatches)
        last = stage == p.pp - 1
        # logits, and their softmax in fp32 with one temporary
        logits = t.micro_batch_size * t.seq_len * -(-m.vocab_size // p.tp) * (element + 2 * wide) if last else 0
        # in half precision a gradient stands beside the fp32 one until it is added; the largest is the embedding's
        uses = 2 if m.tie_embeddings and p.pp == 1 else 1
        ends_trained = any(n in chosen for n in ("embed.weight", "loss_head.head.weight"))
        passing = uses * m.vocab_size * m.hidden_size * element // p.tp if masters and ends and ends_trained else 0
        candidates.append(
            Memory(
                weights=local * element,
                gradients=updated * wide + passing,
                optimizer=updated * (2 * wide + masters) // (p.dp if p.zero else 1),
                activations=stage_activation_bytes(config, len(layers), live),
                logits=logits,
                overhead=OVERHEAD_BYTES[device],
            )
        )
    return max(candidates, key=lambda c: c.total)


def device_memory(device: str, local_ranks: int) -> tuple[str, int]:
    """("cuda" or "cpu", bytes free for one rank): NVML's total of the smallest GPU, or this machine's memory shared."""
    if device != "cpu":
        gpus = gpu_memory()
        if gpus:
            # what fragmentation and other processes take is not for the plan
            return "cuda", int(0.94 * min(gpus))
        if device == "cuda":
            raise ConfigError("train.device=cuda: NVML finds no NVIDIA GPU here; use cpu or auto")
    return "cpu", available_memory() // max(1, local_ranks)


def gpu_memory() -> list[int]:
    """Total bytes of each GPU by NVML; empty where there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: both mean that there is no GPU to plan for
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]


def available_memory() -> int:
    """Bytes of memory this machine can still give, within its cgroup's limit."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable")]
    total = found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def _topologies(config: Config, world_size: int, local_ranks: int) -> Iterator[tuple[int, int]]:
    m, p = config.model, config.parallel
    for tp in valid_tp(m) if p.tp is None else [p.tp]:
        for pp in range(1, m.num_layers + 1) if p.pp is None else [p.pp]:
            fits_ranks = world_size % (tp * pp * p.cp) == 0 and p.dp in (None, world_size // (tp * pp * p.cp))
            if fits_ranks and (p.tp is not None or tp <= local_ranks):
                yield tp, pp


def choose_topology(config: Config, world_size: int, local_ranks: int, explicit: frozenset[str]) -> tuple[Config, str]:
    """`config` with tp and pp set, and a line that says why.

    A preset's own tp and pp hold where they divide the ranks; a user's are never changed. Otherwise the smallest
    tp x pp that fits the memory leaves the most replicas; of two alike the one with the larger tp, up to a node's
    ranks, has the smaller bubble.
    """
    p = config.parallel
    if p.stages is not None and "parallel.pp" not in explicit:
        p = dataclasses.replace(p, pp=len(p.stages))
    if p.tp and p.pp and world_size % (p.tp * p.pp) == 0:
        why = "as asked" if {"parallel.tp", "parallel.pp"} <= explicit else "the preset's"
        return dataclasses.replace(config, parallel=p), _said(p.tp, p.pp, world_size, why)
    p = dataclasses.replace(
        p,
        tp=p.tp if "parallel.tp" in explicit else None,
        pp=p.pp if "parallel.pp" in explicit or p.stages is not None else None,
    )
    config = dataclasses.replace(config, parallel=p)

    device, free = device_memory(config.train.device, local_ranks)
    found = []
    for tp, pp in _topologies(config, world_size, local_ranks):
        candidate = resolve(dataclasses.replace(config, parallel=dataclasses.replace(p, tp=tp, pp=pp)), world_size)
        dp = candidate.parallel.dp or 1
        if candidate.train.global_batch_size % (candidate.train.micro_batch_size * dp):
            continue
        found.append((tp * pp, -tp, memory(candidate, device), candidate))
    if not found:
        # no topology obeys every rule: let the checks say which is broken
        one = dataclasses.replace(p, tp=p.tp or 1, pp=p.pp or 1)
        return dataclasses.replace(config, parallel=one), "no topology divides"
    fitting = [f for f in found if f[2].total <= free]
    if fitting:
        _, _, need, chosen = min(fitting, key=lambda f: f[:2])
        why = f"the smallest that fits: {need.total / GIB:.1f} of {free / GIB:.1f} GiB per rank"
    else:
        _, _, need, chosen = min(found, key=lambda f: f[2].total)
        why = "the thriftiest"
    tp, pp = chosen.parallel.tp or 1, chosen.parallel.pp or 1
    return dataclasses.replace(config, parallel=dataclasses.replace(p, tp=tp, pp=pp)), _said(tp, pp, world_size, why)


def _said(tp: int, pp: int, world_size: int, why: str) -> str:
    return f"tp {tp} x pp {pp} x dp {world_size // (tp * pp)} on {_ranks(world_size)} ({why})"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def check_memory(config: Config, world_size: int, local_ranks: int) -> Memory:
    """The need of a resolved configuration; ConfigError with the bytes by kind where this machine has less."""
    device, free = device_memory(config.train.device, local_ranks)
    need = memory(config, device)
    if need.total <= free:
        return need
    p = config.parallel
    where = "GPU" if device == "cuda" else "CPU rank"
    open_parallel = dataclasses.replace(p, tp=None, pp=None, dp=None, stages=None)

    def least(ranks: int) -> int:
        layouts = (
            dataclasses.replace(config, parallel=dataclasses.replace(open_parallel, tp=tp, pp=pp))
            for tp, pp in _topologies(dataclasses.replace(config, parallel=open_parallel), ranks, 8)
        )
        return min((memory(resolve(layout, ranks), device).total for layout in layouts), default=need.total)

    ranks = next((world_size << k for k in range(1, 8) if least(world_size << k) <= free), None)
    more = f"{ranks} such ranks" if ranks else f"{where}s with more memory"
    raise ConfigError(
        f"a model of {parameters(config.model) / 1e9:.2f}e9 parameters does not fit {_ranks(world_size)} of "
        f"{free / GIB:.1f} GiB per {where}: tp {p.tp} x pp {p.pp} x dp {p.dp} needs {need.table()} per rank; "
        f"what would fit: {more}, ranks of {math.ceil(need.total / GIB)} GiB, a smaller model (--preset tiny, 125m, "
        f"1b), {'' if p.recompute == 'full' else 'parallel.recompute=full, '}or less "
        f"train.micro_batch_size={config.train.micro_batch_size} or train.seq_len={config.train.seq_len}"
    )
