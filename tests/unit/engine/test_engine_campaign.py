"""Random training problems at random topologies: two optimizer steps equal those of one rank, in float64.

What `resolve` and `check` do not refuse in one line trains, each rank a thread. Oracle: the same problem on one rank
under 1F1B. Without tied ends and Muon each loss and weight also has the bits of 1F1B at the same tp, sp, dp and ZeRO.
"""

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from campaign import rounds
from problems import LR, Rows, draw_batches, draw_fitting
from test_engine_parity_tune import random_weights
from torch import Tensor

from megalite.config import Config, Resolved
from megalite.config.resolved import ResolvedParallel
from megalite.engine.engine import build
from megalite.optim.adamw import clip_scale
from megalite.parallel.cuts import Shard
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads
from megalite.plan.costs import rank_memory

TOLERANCE = 1e-12
# Gradients that are zero but for rounding, as of queries that see one key, are measured against the others.
FLOOR = 1e-3


@dataclass(frozen=True)
class Rank:
    """What a rank has after the last step.

    place: (pp, dp, tp). figures: loss, trained tokens and Σ g² of each step and the loss of an evaluation, each summed
    over all ranks. losses: of each microbatch. kinds: {weight, exp_avg, ...: {name: the local tensor, or the range
    `held` of it}}. gradients: bytes.
    """

    place: tuple[int, int, int]
    figures: list[float]
    losses: list[Tensor]
    kinds: dict[str, dict[str, Tensor]]
    shards: dict[str, Shard]
    held: dict[str, range]
    gradients: int

    def bytes(self, *kinds: str) -> int:
        return sum(x.numel() * x.element_size() for kind in kinds for x in self.kinds.get(kind, {}).values())


def play(config: Resolved, steps: list[Rows], weights: dict[str, Tensor]) -> list[Rank]:
    def main(world: World) -> Rank:
        engine = build(config, world, lambda name, shape: weights[name])
        mesh, figures, losses = engine.mesh, [], []

        def total(*values: float) -> list[float]:
            return mesh.world.all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()

        for step in steps:
            sums = engine.forward_backward(step[mesh.dp.rank :: mesh.dp.size])
            losses += [loss.clone() for loss in engine.microbatch_losses]
            loss, tokens, squares = total(sums["loss"], sums["tokens"], engine.gradient_squares())
            figures += [loss, tokens, squares]
            if tokens:
                engine.update(LR, clip_scale(config.optim, squares, tokens)[1])
        evaluated = engine.evaluate(steps[0][mesh.dp.rank :: mesh.dp.size])["loss"]
        kinds = engine.state() | {"weight": {name: p.detach() for name, p in engine.parameters.items()}}
        held = {name: engine.grads.held(name) for name in engine.grads.spans}
        gradients = sum(x.numel() * x.element_size() for x in engine.grads.main_grad.values())
        place = (mesh.pp.rank, mesh.dp.rank, mesh.tp.rank)
        return Rank(place, [*figures, *total(evaluated)], losses, kinds, engine.shards, held, gradients)

    p = config.parallel
    return run_threads(p.tp * p.pp * p.dp, main, timeout_s=30)


def alone(config: Resolved, **layout: Any) -> Resolved:
    """The same problem under plain 1F1B, without pipeline or, unless `layout` says so, any other parallelism."""
    return dataclasses.replace(config, parallel=ResolvedParallel(**({"tp": 1, "pp": 1, "dp": 1, "sp": False} | layout)))


def compare(ranks: list[Rank], one: Rank) -> None:
    """Every figure, and every rank's part of every tensor, its copies of what is replicated and its padding too."""
    wrong: dict[str, float] = {}
    for rank in ranks:
        for i, (figure, expected) in enumerate(zip(rank.figures, one.figures, strict=True)):
            if not abs(figure - expected) <= TOLERANCE * abs(expected):
                wrong[f"figure {i}"] = abs(figure - expected) / (abs(expected) or 1.0)
    for kind, tensors in one.kinds.items():
        largest = {name: float(x.abs().max()) for name, x in tensors.items()}
        floor = FLOOR * max(largest.values(), default=0.0)
        names: set[str] = set()
        for rank in ranks:
            for name, x in rank.kinds.get(kind, {}).items():
                names.add(name)
                shard, scale = rank.shards[name], max(largest[name], floor) or 1.0
                local = shard.cut(tensors[name].view(shard.whole_shape)).flatten()
                if x.numel() < len(local):
                    local = local[rank.held[name].start : rank.held[name].stop]
                error = float((x.flatten() - local).abs().max()) / scale
                if not error <= TOLERANCE:
                    wrong[f"{kind} of {name} on {rank.place}"] = error
        assert names == tensors.keys(), (kind, names ^ tensors.keys())
    assert not wrong, ", ".join(f"{key}: {error:.2g}" for key, error in list(wrong.items())[:6])


def compare_bits(ranks: list[Rank], plain: list[Rank]) -> None:
    """Every loss and weight is bit for bit that of 1F1B on one pipeline rank at the same tp, sp, dp and ZeRO."""
    for rank in ranks:
        one = next(p for p in plain if p.place[1:] == rank.place[1:])
        if rank.losses:
            pairs = zip(rank.losses, one.losses, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), f"{rank.place}: the losses do not have 1F1B's bits"
        for name, x in rank.kinds["weight"].items():
            assert torch.equal(x, one.kinds["weight"][name]), f"{rank.place}: {name} does not have 1F1B's bits"


def compare_memory(config: Resolved, ranks: list[Rank]) -> None:
    """The plan's bytes are what the engines hold; ZeRO's shares together, as a bucket need not divide evenly."""
    needs, p = rank_memory(config, "cpu"), config.parallel
    states: Counter[tuple[int, ...]] = Counter()
    for rank in ranks:
        need = needs[rank.place[0]]
        assert need.weights == rank.bytes("weight"), f"{rank.place}: {need} but weights {rank.bytes('weight')}"
        # in half precision the plan adds what stands beside the fp32 gradients for a moment
        exact = config.train.dtype in ("fp32", "fp64")
        assert need.gradients == rank.gradients or (not exact and need.gradients > rank.gradients), rank.place
        states[rank.place[::2] if p.zero else rank.place] += rank.bytes(*(rank.kinds.keys() - {"weight"}))
    for place, held in states.items():
        need = needs[place[0]]
        assert need.optimizer == held // (p.dp if p.zero else 1), f"{place}: {need} but optimizer {held}"


def outcome(config: Resolved, r: random.Random) -> str:
    steps, weights = draw_batches(r, config), random_weights(config)
    found = play(config, steps, weights)
    compare(found, play(alone(config), steps, weights)[0])
    compare_memory(config, found)
    # a tied matrix sums the parts of its gradient in another order where its ends are on two ranks
    if config.optim.name == "muon" or (config.model.tie_embeddings and "embed.weight" in config.shapes.trained):
        return "equal"
    if r.random() < 0.3:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="bf16"))
        found = play(config, steps, weights)
        compare_memory(config, found)
    p = config.parallel
    compare_bits(found, play(alone(config, tp=p.tp, sp=p.sp, dp=p.dp, zero=p.zero), steps, weights))
    return "equal, and bit for bit"


def changed(config: Config) -> str:
    """The keys that are not at their defaults."""
    keys = (
        (section.name, key.name, getattr(getattr(config, section.name), key.name), key.default)
        for section in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(config, section.name))
    )
    return " ".join(f"{section}.{key}={value}" for section, key, value, default in keys if value not in (default, {}))


@pytest.mark.timeout(3600)
def test_random_training_problems(capsys: pytest.CaptureFixture[str]) -> None:
    count = rounds(12, 400)
    found: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    for seed in range(count):
        r = random.Random(seed)
        config = draw_fitting(r, refusals)
        try:
            found[outcome(config, r)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {changed(config)}: {error!r}") from error
    bits = found["equal, and bit for bit"]
    with capsys.disabled():
        print(
            f"\n{count} training problems: all equal to one rank's, {bits} of them bit for bit to 1F1B's; "
            f"{refusals.total()} more refused in {len(refusals)} ways"
        )
    assert bits > count // 3
    assert len(refusals) > 5
