"""What a topology costs, against a real model on meta, brute force and what must grow with what."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
from models import LLAMA_7B, tiny

from megalite.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    resolve,
)
from megalite.plan.costs import memory, rank_memory, stage_layers
from megalite.plan.counts import head_flops, layer_flops, parameters

SMALL = tiny(num_layers=3, ffn_hidden_size=20, num_kv_heads=None)
FULL = {"train": {"global_batch_size": 1024}}  # enough microbatches to fill a pipeline
EIGHT = {"seq_len": 64, "micro_batch_size": 1, "global_batch_size": 8}


def make(model: ModelConfig = SMALL, ranks: int = 1, train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    config = Config(model=model, parallel=ParallelConfig(**parallel), train=TrainConfig(**(train or {})))
    return resolve(config, ranks)


def slowest(counts: tuple[int, ...], head: float) -> float:
    return max(*counts[:-1], counts[-1] + head) if len(counts) > 1 else counts[0] + head


def splits(layers: int, stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))
        for cuts in itertools.combinations(range(1, layers), stages - 1)
    ]


@pytest.mark.parametrize("vocab", [16, 500, 2000, 8000])
def test_balanced_stages_are_the_best_there_are(vocab: int) -> None:
    for layers, stages in itertools.product((1, 4, 7, 10), (1, 2, 3, 4)):
        if stages > layers:
            continue
        model = dataclasses.replace(SMALL, num_layers=layers, vocab_size=vocab)
        config = make(model, stages, pp=stages)
        found = stage_layers(config)
        counts = tuple(map(len, found))
        assert [layer for stage in found for layer in stage] == list(range(layers))
        head = head_flops(config.model) / layer_flops(config.model, config.train.seq_len)
        every = splits(layers, stages)
        best = min(slowest(split, head) for split in every)
        assert slowest(counts, head) == pytest.approx(best, rel=1e-12)
        # and the most even one of those
        uneven = [sum(c * c for c in s[:-1]) + (s[-1] + head) ** 2 for s in every if slowest(s, head) <= best + 1e-9]
        assert sum(c * c for c in counts[:-1]) + (counts[-1] + head) ** 2 == pytest.approx(min(uneven), rel=1e-12)


def test_the_head_makes_the_last_stage_shorter() -> None:
    heavy = dataclasses.replace(SMALL, num_layers=8, vocab_size=4000)
    light = dataclasses.replace(heavy, vocab_size=16)
    assert [len(r) for r in stage_layers(make(light, 4, pp=4))] == [2, 2, 2, 2]
    counts = [len(r) for r in stage_layers(make(heavy, 4, pp=4))]
    assert counts[-1] == 1
    assert sum(counts) == 8


def test_the_stages_of_chunks_are_balanced_each_for_itself() -> None:
    light = dataclasses.replace(SMALL, num_layers=7, vocab_size=16)
    found = stage_layers(make(light, 3, pp=3, schedule="interleaved", chunks=2))
    assert sorted(map(len, found)) == [1, 1, 1, 1, 1, 2]
    assert [layer for stage in found for layer in stage] == list(range(7))


@pytest.mark.parametrize("tied", [False, True])
def test_memory_of_a_rank_sums_its_chunks(tied: bool) -> None:
    model = dataclasses.replace(SMALL, num_layers=8, vocab_size=16, tie_embeddings=tied)
    for pp, chunks in ((1, 2), (2, 2), (2, 4), (4, 2)):
        plain = make(model, pp, EIGHT, pp=pp, stages=(8 // pp,) * pp)
        more = {"schedule": "interleaved", "chunks": chunks, "stages": (8 // pp // chunks,) * pp * chunks}
        cut = make(model, pp, EIGHT, pp=pp, **more)
        whole, parts = rank_memory(plain, "cpu"), rank_memory(cut, "cpu")
        for kind in ("weights", "gradients", "optimizer", "logits"):
            assert [getattr(need, kind) for need in parts] == [getattr(need, kind) for need in whole]
        # docs/pipeline-parallel.md: of a chunk's activations so many, beside so many of a whole rank's
        kept = [min(2 * (pp - r - 1) + (chunks - 1) * pp + 1, 8 * chunks) / chunks for r in range(pp)]
        for rank, (need, part) in enumerate(zip(whole, parts)):
            assert part.activations / need.activations == pytest.approx(kept[rank] / min(pp - rank, 8), rel=1e-3)


def test_memory_of_a_split_backward_counts_what_waits() -> None:
    model = dataclasses.replace(SMALL, num_layers=8, vocab_size=4096)
    plain, split = (
        rank_memory(make(model, 4, EIGHT, pp=4, schedule=name, stages=(2, 2, 2, 2)), "cpu")
        for name in ("1f1b", "zb-h1")
    )
    more = [b.activations - a.activations for a, b in zip(plain, split)]
    # on the first rank a weight gradient follows at once; on the last the head's output gradients wait
    assert more[0] == 0
    assert sorted(more) == more
    assert more[3] > 3 * 64 * 4096 * 4


def test_stages_written_by_hand_are_taken() -> None:
    config = make(dataclasses.replace(SMALL, num_layers=7), 3, pp=3, stages=(1, 4, 2))
    assert stage_layers(config) == [range(0, 1), range(1, 5), range(5, 7)]


def need(model: ModelConfig = LLAMA_7B, ranks: int = 64, train: dict[str, Any] | None = None, **parallel: Any) -> Any:
    train = {"seq_len": 2048, "micro_batch_size": 1, "global_batch_size": 64, "dtype": "bf16"} | (train or {})
    return memory(make(model, ranks, train, **parallel), "cuda")


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"tp": 2}, {}),
        ({"tp": 4}, {"tp": 2}),
        ({"tp": 8}, {"tp": 4}),
        ({"pp": 2}, {}),
        ({"pp": 4}, {"pp": 2}),
        ({"tp": 2, "pp": 4}, {"tp": 2, "pp": 2}),
        ({"tp": 2}, {"tp": 2, "sp": False}),
        ({"pp": 4}, {"pp": 4, "schedule": "gpipe"}),
        (FULL | {"pp": 4}, FULL | {"pp": 4, "schedule": "interleaved", "chunks": 2}),
        (FULL | {"pp": 4, "schedule": "interleaved", "chunks": 4}, FULL | {"pp": 4, "schedule": "gpipe"}),
        ({}, {"train": {"seq_len": 4096}}),
        ({}, {"train": {"micro_batch_size": 2}}),
        ({}, {"train": {"dtype": "fp32", "micro_batch_size": 8}}),
        ({"model": dataclasses.replace(LLAMA_7B, num_layers=31)}, {}),
        ({"model": dataclasses.replace(LLAMA_7B, tie_embeddings=True)}, {}),
        ({"model": dataclasses.replace(LLAMA_7B, num_kv_heads=8)}, {}),
        ({"model": dataclasses.replace(LLAMA_7B, vocab_size=16000)}, {}),
        ({"recompute": "full"}, {}),
        ({"recompute": "full"}, {"recompute": "full", "recompute_layers": 8}),
        ({"recompute": "full", "recompute_layers": 8}, {"recompute": "full", "recompute_layers": 4}),
        (
            {"recompute": "selective", "train": {"kernels": "fused"}},
            {"train": {"kernels": "fused"}},
        ),
        ({"train": {"kernels": "auto"}}, {"train": {"kernels": "fused"}}),
        ({"train": {"dtype": "fp32"}}, {"train": {"dtype": "fp64"}}),
    ],
)
def test_memory_is_monotone(less: dict[str, Any], more: dict[str, Any]) -> None:
    assert need(**less).total < need(**more).total


def test_memory_of_one_rank_counts_every_parameter() -> None:
    config = make(dataclasses.replace(SMALL, tie_embeddings=True, num_layers=5))
    found = memory(config, "cpu")
    count = parameters(config.model)
    assert found.weights == 4 * count
    assert found.gradients == found.weights
    assert found.optimizer == 2 * found.weights
    half = memory(make(dataclasses.replace(SMALL, num_layers=5), train={"dtype": "bf16"}), "cpu")
    assert half.optimizer == 6 * half.weights  # masters beside moments
    assert half.gradients == 2 * half.weights + SMALL.vocab_size * SMALL.hidden_size * 2  # fp32, and one in passing
    assert found.total == sum(dataclasses.astuple(found))
    assert "weights" in found.table()


def test_zero_divides_optimizer_states_alone() -> None:
    whole, shared = (
        memory(make(LLAMA_7B, 8, {"seq_len": 2048, "dtype": "bf16", "global_batch_size": 64}, tp=2, zero=zero), "cuda")
        for zero in (0, 1)
    )
    assert shared.optimizer == whole.optimizer // 4
    assert dataclasses.replace(shared, optimizer=whole.optimizer) == whole
    # of bf16: 2 bytes of weights, 4 of gradients, 12 / dp of optimizer
    assert shared.optimizer * 4 == pytest.approx(6 * shared.weights, rel=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_muon_keeps_one_moment_of_hidden_matrices(dtype: str) -> None:
    config = make(train={"dtype": dtype})
    adamw = memory(config, "cpu")
    muon = memory(dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="muon")), "cpu")
    hidden = sum(math.prod(config.shapes.trained[name]) for name in config.shapes.hidden)
    assert adamw.optimizer - muon.optimizer == 4 * hidden > 0
    assert dataclasses.replace(muon, optimizer=adamw.optimizer) == adamw
