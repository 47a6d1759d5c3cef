"""Every schedule computes the same bits, and a split backward really defers its weight gradients."""

import dataclasses
from typing import Any

import pytest
import torch
from test_engine_parity import batches
from torch import Tensor

from megalite.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
    check,
    resolve,
)
from megalite.config.schedules import SCHEDULES as TABLE
from megalite.config.schedules import Schedule
from megalite.engine.engine import build
from megalite.parallel.grad_buffers import GradBuffers
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads
from megalite.pipeline import executor
from megalite.pipeline.schedule import PLANS, Action, Plan, make_plan
from megalite.plan.costs import rank_memory

MODEL = ModelConfig(
    vocab_size=101, hidden_size=24, num_layers=7, num_heads=4, num_kv_heads=2, ffn_hidden_size=36, linear_bias=True
)
TRAIN = TrainConfig(dtype="fp32", seq_len=12, micro_batch_size=2, global_batch_size=8)
LORA = TuneConfig(mode="lora", lora_rank=2, lora_dropout=0.2)
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b-2": {"pp": 2},
    "gpipe-4": {"pp": 4, "schedule": "gpipe"},
    "interleaved-1x2": {"schedule": "interleaved", "chunks": 2},
    "interleaved-1x7": {"schedule": "interleaved", "chunks": 7},
    "interleaved-2x2": {"pp": 2, "schedule": "interleaved", "chunks": 2},
    "interleaved-2x3": {"pp": 2, "schedule": "interleaved", "chunks": 3},
    "zb-h1-1": {"schedule": "zb-h1"},
    "zb-h1-2": {"pp": 2, "schedule": "zb-h1"},
    "zb-h1-4": {"pp": 4, "schedule": "zb-h1"},
}


def make(tune: TuneConfig | None = None, tied: bool = False, dropout: float = 0.0, **parallel: Any) -> Config:
    model = dataclasses.replace(MODEL, tie_embeddings=tied, dropout=dropout)
    layout = ParallelConfig(**({"tp": 1, "pp": 1, "dp": 1, "bucket_mb": 0.005} | parallel))
    load = CheckpointConfig(load="base") if tune else CheckpointConfig()
    ranks = (layout.tp or 1) * (layout.pp or 1) * (layout.dp or 1)
    config = resolve(Config(model, layout, train=TRAIN, tune=tune or TuneConfig(), checkpoint=load), ranks)
    check(config, ranks)
    return config


def bits(config: Config) -> dict[str, Tensor]:
    """Losses and gradients of a step in fp32, the first replica's and tp rank's parts of them."""
    found: dict[str, Tensor] = {}

    def main(world: World) -> None:
        engine = build(config, world)
        dp = engine.mesh.dp
        step = [
            dataclasses.replace(mb, loss_mask=mb.loss_mask.float(), samples=torch.arange(2) + 2 * i)
            for i, mb in enumerate(batches(False))
        ]
        engine.forward_backward(step[dp.rank :: dp.size])
        if dp.rank == engine.mesh.tp.rank == 0:
            found.update({name: grad.clone() for name, grad in engine.grads.main_grad.items()})
            if engine.mesh.is_last_stage:
                found["losses"] = torch.stack(list(engine.microbatch_losses))

    p = config.parallel
    run_threads((p.tp or 1) * (p.pp or 1) * (p.dp or 1), main)
    return found


@pytest.mark.parametrize(
    "more", [{}, {"tune": LORA}, {"dropout": 0.1, "recompute": "full"}, {"tp": 2, "dp": 2}], ids=str
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_bits_are_those_of_one_stage(name: str, more: dict[str, Any]) -> None:
    expected, found = bits(make(**more)), bits(make(**SCHEDULES[name], **more))
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert any(grad.any() for grad in expected.values())


def eager(num_ranks: int, num_microbatches: int) -> Plan:
    """1F1B with twice the warmup, as docs/pipeline-parallel.md has it."""
    plan: Plan = []
    for rank, actions in enumerate(make_plan("gpipe", num_ranks, num_microbatches)):
        warmup = min(2 * (num_ranks - rank - 1), num_microbatches)
        forwards, backwards = actions[:num_microbatches], actions[num_microbatches:-1]
        steady = [action for pair in zip(forwards[warmup:], backwards) for action in pair]
        plan.append([*forwards[:warmup], *steady, *backwards[num_microbatches - warmup :], actions[-1]])
    return plan


def test_a_new_schedule_is_a_function_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks, plan and engine take it from the table; keys and help do so when they are imported."""
    with pytest.raises(ConfigError, match=r"schedule=eager: must be one of"):
        make(pp=4, schedule="eager")
    monkeypatch.setitem(TABLE, "eager", Schedule())
    monkeypatch.setitem(PLANS, "eager", eager)
    config, plain = make(pp=4, schedule="eager"), make(pp=4)
    expected, found = bits(plain), bits(config)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    # four microbatches: the second rank keeps all of them, not three
    more, usual = rank_memory(config, "cpu"), rank_memory(plain, "cpu")
    assert more[0] == usual[0]
    assert more[1].activations * 3 == usual[1].activations * 4


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_a_split_backward_defers_every_weight_of_a_linear(pp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[int] = []
    run_jobs = executor._Run.weight_gradients

    def counted(self: executor._Run, action: Action) -> None:
        jobs.append(len(self.deferred[action.stage, action.microbatch]))
        run_jobs(self, action)

    monkeypatch.setattr(executor._Run, "weight_gradients", counted)
    bits(make(pp=pp, schedule="zb-h1"))
    assert len(jobs) == 4 * pp
    # four linears a block, and the head
    assert sum(jobs) == 4 * (4 * MODEL.num_layers + 1)
    bits(make(pp=pp, schedule="1f1b"))
    assert len(jobs) == 4 * pp


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_bucket_leaves_before_the_step_ends(name: str, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter counts as complete with its last contribution: an earlier start would give other gradients
    (test_engine_parity.py), a later one would wait for REDUCE."""
    under_way: list[bool] = []
    finish = GradBuffers.finish

    def watched(self: GradBuffers) -> None:
        under_way.extend(bucket.pending is not None for bucket in self.buckets)
        finish(self)

    monkeypatch.setattr(GradBuffers, "finish", watched)
    bits(make(dp=2, tied=tied, **SCHEDULES[name]))
    assert len(under_way) > 8
    assert all(under_way)
