"""Chooses tp x pp for a run and checks that it fits: what it needs, compared with what the ranks have.

No torch here: a run that cannot fit is refused before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megalite.config import Config, ConfigError, Resolved, check, reopen, resolve
from megalite.config.check import valid_tp
from megalite.config.pipeline_rules import pipeline_fault
from megalite.plan.costs import GIB, Memory, memory, rank_memory
from megalite.plan.counts import parameters
from megalite.plan.hardware import gpu_gib

# share of a GPU's memory that a plan may use; the rest is for fragmentation and other processes
USABLE = 0.94
NODE = 8  # ranks per node of other hardware, unless per_node is given
C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Machine:
    """A run's hardware: `ranks`, `local` of them per node, each with `free` bytes on `device` ("cuda" or "cpu")."""

    ranks: int
    local: int
    device: str
    free: int
    name: str = "this machine"

    @property
    def where(self) -> str:
        return "GPU" if self.device == "cuda" else "CPU rank"


def this_machine(device: str, ranks: int, local: int) -> Machine:
    return Machine(ranks, local, *device_memory(device, local))


def other_machine(device: str, ranks: int, local: int | None, gpu: str | None) -> Machine:
    """The hardware of `world=N gpu=NAME per_node=N`; without `gpu`, nodes like this one."""
    local = min(local or NODE, ranks)
    if gpu is None:
        return dataclasses.replace(this_machine(device, ranks, local), name="nodes like this one")
    if device == "cpu":
        raise ConfigError(f"gpu={gpu} and train.device=cpu contradict each other; leave one of them out")
    gib = gpu_gib(gpu)
    return Machine(ranks, local, "cuda", int(USABLE * gib * GIB), f"GPUs of {gib:g} GiB (gpu={gpu})")


def device_memory(device: str, local_ranks: int) -> tuple[str, int]:
    """("cuda" or "cpu", bytes for one rank): the smallest GPU's memory by NVML, or this rank's share of main memory.

    Raises ConfigError if train.device=cuda and there is no GPU.
    """
    if device != "cpu":
        gpus = gpu_memory()
        if gpus:
            return "cuda", int(USABLE * min(gpus))
        if device == "cuda":
            raise ConfigError("train.device=cuda: NVML finds no NVIDIA GPU here; use cpu or auto")
    return "cpu", available_memory() // max(1, local_ranks)


def gpu_memory() -> list[int]:
    """Total bytes of each GPU by NVML; empty without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # without driver or library there is no GPU to plan for
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles]


def available_memory() -> int:
    """Bytes of memory still available on this machine, within its cgroup's limit."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    found = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable")]
    total = found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total


def _layouts(config: Config, ranks: int, local: int) -> Iterator[Resolved]:
    """Yield `config`, resolved, at every valid tp x pp that it leaves open."""
    m, p, t = config.model, config.parallel, config.train
    # the length of the decay does not affect memory, and takes long to compute for a long ramp
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_samples=10**15))
    for tp in valid_tp(m) if p.tp is None else [p.tp]:
        if p.tp is None and (tp > local or (p.sp and t.seq_len % tp)):
            continue
        for pp in range(1, min(m.num_layers, ranks) + 1) if p.pp is None else [p.pp]:
            dp, left = divmod(ranks, tp * pp * p.cp)
            if left or p.dp not in (None, dp) or t.global_batch_size % (t.micro_batch_size * dp):
                continue
            parallel = dataclasses.replace(p, tp=tp, pp=pp, dp=dp)
            layout = resolve(dataclasses.replace(config, parallel=parallel), ranks)
            if not pipeline_fault(layout):
                yield layout


def choose_topology(config: Config, machine: Machine, explicit: frozenset[str]) -> tuple[Config, str]:
    """Return `config` with tp and pp set, and a line that says why.

    The user's values are never changed; a preset's are used if they divide the ranks. Otherwise the smallest tp x pp
    that fits into memory is chosen, which leaves the most replicas; of equals, the one with the larger tp, up to the
    ranks of a node, which has the smaller bubble.
    """
    p, ranks = config.parallel, machine.ranks
    if p.stages is not None and "parallel.pp" not in explicit:
        p = dataclasses.replace(p, pp=max(1, len(p.stages) // p.chunks))
    if p.tp and p.pp and ranks % (p.tp * p.pp) == 0:
        why = "as asked" if {"parallel.tp", "parallel.pp"} <= explicit else "the preset's"
        return dataclasses.replace(config, parallel=p), _topology(p.tp, p.pp, ranks, why)
    p = dataclasses.replace(
        p,
        tp=p.tp if "parallel.tp" in explicit else None,
        pp=p.pp if "parallel.pp" in explicit or p.stages is not None else None,
    )
    config = dataclasses.replace(config, parallel=p)
    found = [(memory(layout, machine.device), layout.parallel) for layout in _layouts(config, ranks, machine.local)]
    if not found:
        # no topology is valid: the checks then name the rule that is broken
        one = dataclasses.replace(p, tp=p.tp or 1, pp=p.pp or 1)
        return dataclasses.replace(config, parallel=one), "no topology divides"
    fitting = [f for f in found if f[0].total <= machine.free]
    if fitting:
        need, chosen = min(fitting, key=lambda f: (f[1].tp * f[1].pp, -f[1].tp))
        why = f"the smallest that fits: {need.total / GIB:.1f} of {machine.free / GIB:.1f} GiB per rank"
    else:
        _, chosen = min(found, key=lambda f: f[0].total)
        why = "none fits; this one needs the least memory"
    config = dataclasses.replace(config, parallel=dataclasses.replace(p, tp=chosen.tp, pp=chosen.pp))
    return config, _topology(chosen.tp, chosen.pp, ranks, why)


def lay_out(config: Config, machine: Machine, explicit: frozenset[str]) -> tuple[Resolved, str]:
    """`config` laid out on `machine`, resolved and checked, and a line that says why its tp and pp were chosen.

    `explicit`: the keys that the user has set. Raises ConfigError if it cannot run there, whatever its memory.
    """
    config, why = choose_topology(config, machine, explicit)
    resolved = resolve(config, machine.ranks)
    check(resolved, machine.ranks)
    return resolved, why


def _topology(tp: int, pp: int, ranks: int, why: str) -> str:
    return f"tp {tp} x pp {pp} x dp {ranks // (tp * pp)} on {_ranks(ranks)} ({why})"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def check_memory(config: Resolved, machine: Machine, first_try: bool = False) -> Memory:
    """Return the memory that the fullest rank needs.

    Raises ConfigError, with the bytes by kind and what would fit, if it is more than a rank has. `first_try`: the user
    has set nothing, so that any model will do.
    """
    need = memory(config, machine.device)
    if need.total <= machine.free:
        return need
    p = config.parallel
    other = "; --dry-run world=64 gpu=h100 plans for other hardware" if machine.name == Machine.name else ""
    tiny = "; to see a run on this machine: --preset tiny" if first_try else ""
    raise ConfigError(
        f"a model of {parameters(config.model) / 1e9:.2f}e9 parameters does not fit {_ranks(machine.ranks)} of "
        f"{machine.free / GIB:.1f} GiB per {machine.where}: tp {p.tp} x pp {p.pp} x dp {p.dp} needs {need.table()} per "
        f"rank; what would fit: {'; or '.join(_remedies(config, machine, need))}{other}{tiny}"
    )


def _remedies(config: Resolved, machine: Machine, need: Memory) -> list[str]:
    """What would make it fit: single keys that do, or all of them together, then other hardware."""
    p, t = config.parallel, config.train
    changes = {
        "parallel.recompute=full": p.recompute != "full",
        "parallel.zero=1": p.zero == 0 and p.dp > 1,
        "train.micro_batch_size=1": t.micro_batch_size > 1,
        "tune.mode=lora": config.tune.mode == "full" and bool(config.checkpoint.load or config.model.from_hf),
    }
    useful = [change for change, possible in changes.items() if possible]
    fits = [c for c in useful if memory(_changed(config, c), machine.device).total <= machine.free]
    if not fits and len(useful) > 1 and memory(_changed(config, *useful), machine.device).total <= machine.free:
        fits = [" ".join(useful)]
    # the longest sequence that fits, and another topology on the same ranks, or on more
    lengths = (t.seq_len >> k for k in range(1, 4) if (t.seq_len >> k) % p.tp == 0 and t.seq_len >> k >= 512)
    shorter = (f"train.seq_len={n}" for n in lengths)
    fits += [c for c in shorter if memory(_changed(config, c), machine.device).total <= machine.free][:1]
    free = reopen(config, "parallel.tp", "parallel.pp", "parallel.dp", "parallel.stages")
    for ranks, keys in itertools.product((machine.ranks << k for k in range(12)), ([], useful)):
        least = min(
            _layouts(_changed(free, *keys), ranks, max(NODE, machine.local)),
            key=lambda c: memory(c, machine.device).total,
            default=config,
        )
        if memory(least, machine.device).total <= machine.free:
            cut = " ".join([f"parallel.tp={least.parallel.tp} parallel.pp={least.parallel.pp}", *keys])
            fits.append(cut if ranks == machine.ranks else f"{ranks} such ranks with {cut}")
            break
    return [
        *fits,
        f"{machine.where}s of {math.ceil(need.total / (USABLE if machine.device == 'cuda' else 1) / GIB)} GiB",
    ]


def _changed(config: C, *changes: str) -> C:
    for change in changes:
        key, value = change.split("=")
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: int(value) if value.isdigit() else value})
        config = dataclasses.replace(config, **{section: part})
    return config


def memory_table(config: Resolved, machine: Machine) -> str:
    """The bytes of each rank by kind, with one line for equal stages, and whether they fit."""
    p, rows = config.parallel, []
    width = p.tp * p.dp * p.cp
    needs = rank_memory(config, machine.device)
    start = 0
    for stage in range(1, len(needs) + 1):
        if stage == len(needs) or needs[stage] != needs[start]:
            stages = f"{start}" if stage - start == 1 else f"{start}-{stage - 1}"
            ranks = f"{start * width}" if stage * width - start * width == 1 else f"{start * width}-{stage * width - 1}"
            kinds = [f"{v / GIB:.2f}" for v in (*dataclasses.astuple(needs[start]), needs[start].total)]
            rows.append([stages, ranks, *kinds])
            start = stage
    head = ["stage" if p.chunks == 1 else "pp", "ranks", *(f.name for f in dataclasses.fields(Memory)), "total"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["    " + "  ".join(word.rjust(w) for word, w in zip(row, widths)) for row in [head, *rows]]
    fullest = max(need.total for need in needs)
    verdict = "fits" if fullest <= machine.free else "does NOT fit"
    return (
        f"  hardware: {_ranks(machine.ranks)}, {machine.local} a node; {machine.name}\n"
        f"  memory of each rank in GiB:\n" + "\n".join(lines) + "\n"
        f"    {verdict}: the fullest rank needs {fullest / GIB:.2f} of {machine.free / GIB:.2f} GiB"
    )
