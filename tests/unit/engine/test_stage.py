"""One rank's part of the model: which layers it holds, what its stages cost, and where results are."""

import dataclasses

import pytest
import torch
from models import tiny
from torch import Tensor
from torch.nn import functional as F

from megalite.config import Config, ParallelConfig, Resolved, TrainConfig, resolve
from megalite.config.shapes import shapes
from megalite.engine.batches import Microbatch
from megalite.engine.stage import Stage, build_stage, stage_costs
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads
from megalite.plan.counts import head_flops, layer_flops

B, S, LAYOUTS = 2, 8, [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"pp": 2, "schedule": "interleaved", "chunks": 2}]


def config(tied: bool = False, **parallel: object) -> Resolved:
    layout = ParallelConfig(**({"tp": 1, "pp": 1, "dp": 1} | parallel))
    train = TrainConfig(dtype="fp64", seq_len=S, micro_batch_size=B, global_batch_size=2 * B)
    model = tiny(num_layers=4, tie_embeddings=tied)
    return resolve(Config(model, layout, train=train), (layout.tp or 1) * (layout.pp or 1))


def microbatches(count: int = 2) -> list[Microbatch]:
    tokens = torch.randint(0, 101, (count, B, S + 1), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(S).expand(B, S) % 3 > 0).double()
    return [Microbatch(t[:, :-1], t[:, 1:], mask, torch.arange(S).expand(B, S)) for t in tokens]


def everywhere(c: Resolved, main: object) -> list:
    """What `main` returns of every rank's stage."""
    return run_threads(c.parallel.tp * c.parallel.pp, lambda world: main(build_stage(c, world)))  # type: ignore[operator]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_results_are_on_the_last_stage_alone(parallel: dict) -> None:
    """Logits and losses are those of one process, on every tp rank of the last stage."""
    c = config(**parallel)
    mb = microbatches(1)[0]
    alone = build_stage(config(), SoloWorld())
    logits, loss = alone.logits(mb.tokens, mb.positions, None), alone.losses([mb])[0]
    assert logits is not None
    assert logits.shape == (B, S, 101)
    ce = F.cross_entropy(logits.flatten(0, 1), mb.labels.flatten(), reduction="none").view(B, S)
    torch.testing.assert_close(loss, (ce * mb.loss_mask).sum(), rtol=1e-12, atol=0)

    def main(stage: Stage) -> tuple[bool, Tensor | None, list[Tensor]]:
        return stage.mesh.is_last_stage, stage.logits(mb.tokens, mb.positions, None), stage.losses([mb])

    found = everywhere(c, main)
    assert sum(last for last, _, _ in found) == c.parallel.tp
    for last, rank_logits, losses in found:
        assert (rank_logits is None, losses == []) == (not last, not last)
        if last:
            torch.testing.assert_close(rank_logits, logits, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(losses[0], loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_an_evaluation_counts_once(parallel: dict) -> None:
    """One rank of the replica has the sums; on the others they are zeros, so a sum over all ranks is right."""
    mbs = microbatches()
    expected = sum(build_stage(config(), SoloWorld()).losses(mbs)).item()
    found = everywhere(config(**parallel), lambda stage: stage.evaluate(mbs))
    assert all(sums.keys() == {"loss", "tokens"} for sums in found)
    assert sorted(sums["tokens"] for sums in found) == [0.0] * (len(found) - 1) + [2 * B * 5]
    assert sum(sums["loss"] for sums in found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_the_ranks_hold_the_model_once(parallel: dict, tied: bool) -> None:
    c = config(tied, **parallel)
    ranks = everywhere(c, lambda stage: (stage.mesh.tp.rank, list(stage.parameters), list(stage.shards)))
    held = [name for tp_rank, names, _ in ranks if tp_rank == 0 for name in names]
    assert set(held) == set(shapes(c.model))
    # a tied matrix is on both ends of the pipeline
    twice = {name for name in held if held.count(name) > 1}
    assert twice == ({"embed.weight"} if tied and c.parallel.pp > 1 else set())
    assert all(sorted(names) == sorted(cut) for _, names, cut in ranks)


def test_stages_of_one_rank_share_a_tied_matrix() -> None:
    stage = build_stage(config(True, schedule="interleaved", chunks=2), SoloWorld())
    assert sorted(stage.models) == [0, 1]
    first, last = stage.models[0].embed, stage.models[1].loss_head
    assert first is not None
    assert last is not None
    assert first.weight is last.head.weight is stage.parameters["embed.weight"]


def test_weights_are_those_that_value_returns() -> None:
    def main(world: World) -> Stage:
        return build_stage(config(tp=2), world, lambda name, shape: torch.full(shape, float(len(name))))

    for stage in run_threads(2, main):
        assert {p.dtype for p in stage.parameters.values()} == {torch.float64}
        for name, p in stage.parameters.items():
            # the last row of the vocabulary's second part is padding
            assert set(p.unique().tolist()) - {0.0} == {float(len(name))}
            assert bool(p.all()) or (stage.shards[name].local_size == 51 and stage.mesh.tp.rank == 1)


def test_costs_are_relative_to_the_average_stage_and_count_the_head() -> None:
    c = config(pp=2, stages=(3, 1))
    head = head_flops(c.model) / layer_flops(c.model, S)
    factors = stage_costs(c).stage_factors
    assert factors == pytest.approx((2 * 3 / (4 + head), 2 * (1 + head) / (4 + head)), rel=1e-12)
    wide = dataclasses.replace(c, model=dataclasses.replace(c.model, vocab_size=10**6))
    assert stage_costs(wide).stage_factors[1] > 1.9
