"""What a configuration costs, against a real model on meta, brute force and what must grow with what."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from megalite import plan
from megalite.config import (
    Config,
    ConfigError,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    check,
    parse_command_line,
    resolve,
)
from megalite.model.decoder import Decoder
from megalite.parallel.groups import SoloWorld
from megalite.plan import GIB, check_memory, choose_topology, head_flops, layer_flops, memory, parameters, stage_layers

SMALL = ModelConfig(vocab_size=101, hidden_size=24, num_layers=3, num_heads=4, ffn_hidden_size=20)
LLAMA_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    ffn_hidden_size=11008,
    num_kv_heads=32,
    head_dim=128,
)


def make(model: ModelConfig = SMALL, ranks: int = 1, train: dict[str, Any] | None = None, **parallel: Any) -> Config:
    config = Config(model=model, parallel=ParallelConfig(**parallel), train=TrainConfig(**(train or {})))
    return resolve(config, ranks)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("kv", "head_dim"), [(4, 6), (2, 6), (1, 10)])
def test_parameters_are_those_of_the_model(tied: bool, qkv_bias: bool, qk_norm: bool, kv: int, head_dim: int) -> None:
    model = dataclasses.replace(
        SMALL, tie_embeddings=tied, qkv_bias=qkv_bias, qk_norm=qk_norm, num_kv_heads=kv, head_dim=head_dim
    )
    with torch.device("meta"):
        decoder = Decoder(model, range(3))
    assert parameters(model) == sum(p.numel() for p in decoder.parameters())
    assert plan.layer_parameters(model) == sum(p.numel() for p in decoder.layers["0"].parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layernorm"},
        {"activation": "gelu"},
        {"linear_bias": True},
        {"linear_bias": True, "activation": "gelu_tanh", "qkv_bias": True},
        {"position": "learned", "max_positions": 13, "tie_embeddings": True},
    ],
    ids=str,
)
def test_parameters_of_options_are_those_of_the_model(options: dict[str, Any]) -> None:
    model = dataclasses.replace(SMALL, num_kv_heads=2, head_dim=6, **options)
    with torch.device("meta"):
        decoder = Decoder(model, range(3))
    assert parameters(model) == sum(p.numel() for p in decoder.parameters())
    assert plan.layer_parameters(model) == sum(p.numel() for p in decoder.layers["0"].parameters())


def test_a_window_saves_the_scores_it_hides() -> None:
    model = dataclasses.replace(SMALL, num_kv_heads=4, head_dim=6)
    full, whole = layer_flops(model, 64), layer_flops(dataclasses.replace(model, sliding_window=64), 64)
    assert full == whole
    windowed = layer_flops(dataclasses.replace(model, sliding_window=8), 64)
    assert full - windowed == pytest.approx(4 * 24 * (32 - (8 - 0.5)))


def test_known_sizes() -> None:
    assert parameters(LLAMA_7B) == 6_738_415_616  # Touvron et al. 2023; as Hugging Face counts it
    # 6 FLOPs per parameter and token, the embedding not multiplied, plus attention's 6 s h a layer, halved by causality
    weights = parameters(LLAMA_7B) - 32000 * 4096 - 65 * 4096
    attention = 32 * 6 * 2048 * 4096
    assert plan.training_flops(LLAMA_7B, 2048) == pytest.approx(6 * weights + attention, rel=1e-12)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("sft-7b", 6_738_415_616),
    ],
)
def test_presets_are_the_published_models(preset: str, count: int) -> None:
    config = parse_command_line(["--preset", preset], default_preset=None, prog="").config
    assert parameters(resolve(config, 1).model) == count


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
    # the final norm is the only thing left out
    assert found.weights == pytest.approx(4 * count, rel=0.01)
    assert found.gradients == found.weights
    assert found.optimizer == 2 * found.weights
    half = memory(make(dataclasses.replace(SMALL, num_layers=5), train={"dtype": "bf16"}), "cpu")
    assert half.optimizer == 6 * half.weights  # masters beside moments
    assert half.gradients == 2 * half.weights + SMALL.vocab_size * SMALL.hidden_size * 2  # fp32, and one in passing
    assert found.total == sum(dataclasses.astuple(found))
    assert "weights" in found.table()


def test_activations_are_about_what_autograd_keeps() -> None:
    """Within a quarter of the bytes that a block's saved tensors hold."""
    from megalite.build import Microbatch, build

    model = ModelConfig(vocab_size=64, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=4, ffn_hidden_size=176)
    config = make(model, train={"seq_len": 128, "micro_batch_size": 2, "global_batch_size": 2, "kernels": "auto"})
    engine = build(config, SoloWorld())
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.zeros(2, 128, dtype=torch.long)
    mb = Microbatch(tokens, tokens, torch.ones(2, 128), torch.arange(128).expand(2, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = engine.model(mb.tokens, mb.positions, None, mb.labels, mb.loss_mask)
    kept = sum(saved.values())
    loss.backward()
    planned = memory(config, "cpu")
    assert 0.75 < (planned.activations + planned.logits) / kept < 1.5


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Machines whose ranks have so many GiB each."""

    def set_to(gib: float) -> None:
        monkeypatch.setattr(plan, "device_memory", lambda device, local_ranks: ("cuda", int(gib * GIB)))

    return set_to


def chosen(ranks: int, explicit: frozenset[str] = frozenset(), local: int = 8, **parallel: Any) -> tuple[tuple, str]:
    model = dataclasses.replace(LLAMA_7B)
    train = TrainConfig(seq_len=2048, micro_batch_size=1, global_batch_size=64, dtype="bf16")
    config = Config(model=model, parallel=ParallelConfig(**parallel), train=train)
    config, said = choose_topology(config, ranks, local, explicit)
    return (config.parallel.tp, config.parallel.pp), said


def test_instruction_tuning_of_a_7b_fits_eight_gpus_of_80_gib(gpu: Any) -> None:
    gpu(0.94 * 80)
    request = parse_command_line(["--preset", "sft-7b"], default_preset=None, prog="")
    config, _ = choose_topology(request.config, 8, 8, request.explicit)
    config = resolve(config, 8)
    check(config, 8)
    assert (config.parallel.tp, config.parallel.pp, config.parallel.dp, config.parallel.zero) == (1, 1, 8, 1)
    assert 70 * GIB < check_memory(config, 8, 8).total < 75.2 * GIB


def test_the_smallest_topology_that_fits_is_chosen(gpu: Any) -> None:
    sizes = {}
    for gib in (24, 40, 80, 200):
        gpu(gib)
        (tp, pp), said = chosen(16)
        fitting = [
            (a * b, -a)
            for a, b in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16))
            if a * b <= 16 and need(ranks=16, tp=a, pp=b).total <= gib * GIB
        ]
        assert (tp * pp, -tp) == min(fitting)
        assert "the smallest that fits" in said
        assert f"tp {tp} x pp {pp} x dp {16 // tp // pp} on 16 ranks" in said
        sizes[gib] = tp * pp
    assert sizes[200] == 1
    assert sizes[24] > sizes[40] >= sizes[80] > 1


def test_tp_stays_within_a_node(gpu: Any) -> None:
    gpu(24)
    assert chosen(16, local=2)[0][0] <= 2
    assert chosen(16, local=8)[0][0] == 8


def test_where_nothing_fits_the_thriftiest_is_named(gpu: Any) -> None:
    gpu(4)
    (tp, pp), said = chosen(4)
    assert tp * pp == 4
    assert "the thriftiest" in said


def test_what_the_user_set_is_never_changed(gpu: Any) -> None:
    gpu(24)
    both = frozenset({"parallel.tp", "parallel.pp"})
    assert chosen(8, both, tp=1, pp=2) == ((1, 2), "tp 1 x pp 2 x dp 4 on 8 ranks (as asked)")
    assert chosen(8, frozenset({"parallel.tp"}), tp=1)[0][0] == 1
    assert chosen(8, frozenset({"parallel.pp"}), pp=8)[0] == (1, 8)
    stages = (10, 10, 12)
    assert chosen(6, frozenset({"parallel.stages"}), stages=stages)[0][1] == 3


def test_a_presets_topology_holds_where_it_divides_the_ranks(gpu: Any) -> None:
    gpu(1000)
    assert chosen(8, tp=2, pp=2) == ((2, 2), "tp 2 x pp 2 x dp 2 on 8 ranks (the preset's)")
    assert chosen(2, tp=2, pp=2)[0] == (1, 1)


def test_what_does_not_fit_is_refused_with_bytes_and_remedies(gpu: Any) -> None:
    gpu(24)
    config = make(LLAMA_7B, 2, {"seq_len": 2048, "micro_batch_size": 1, "dtype": "bf16", "global_batch_size": 64}, tp=2)
    with pytest.raises(ConfigError) as error:
        check_memory(config, 2, 2)
    text = str(error.value)
    assert "6.74e9 parameters does not fit 2 ranks of 24.0 GiB per GPU: tp 2 x pp 1 x dp 1 needs" in text
    for kind in ("weights", "gradients", "optimizer", "activations", "logits", "overhead"):
        assert kind in text
    assert "such ranks" in text
    assert f"ranks of {-(-memory(config, 'cuda').total // GIB)} GiB" in text
    gpu(1000)
    assert check_memory(config, 2, 2) == memory(config, "cuda")


def test_the_number_of_ranks_it_names_would_do(gpu: Any) -> None:
    gpu(24)
    config = make(LLAMA_7B, 2, {"seq_len": 2048, "micro_batch_size": 1, "dtype": "bf16", "global_batch_size": 64}, tp=2)
    with pytest.raises(ConfigError) as error:
        check_memory(config, 2, 2)
    ranks = int(str(error.value).split("what would fit: ")[1].split()[0])
    assert "the smallest that fits" in chosen(ranks)[1]
    assert "the smallest that fits" not in chosen(ranks // 2)[1]


def test_memory_of_this_machine_is_shared_among_its_ranks() -> None:
    device, free = plan.device_memory("cpu", 1)
    assert device == "cpu"
    assert 0 < free < 2**50
    assert plan.device_memory("cpu", 4)[1] < free / 2


def test_a_gpu_asked_for_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpu_memory", list)
    with pytest.raises(ConfigError, match=r"train\.device=cuda: .* use cpu or auto"):
        plan.device_memory("cuda", 1)
    assert plan.device_memory("auto", 1)[0] == "cpu"
    monkeypatch.setattr(plan, "gpu_memory", lambda: [80 * GIB, 40 * GIB])
    device, free = plan.device_memory("auto", 2)
    assert device == "cuda"
    assert 36 * GIB < free < 40 * GIB  # the smaller one, less what is kept free; each rank has its own


def test_zero_divides_optimizer_states_alone() -> None:
    whole, shared = (
        memory(make(LLAMA_7B, 8, {"seq_len": 2048, "dtype": "bf16", "global_batch_size": 64}, tp=2, zero=zero), "cuda")
        for zero in (0, 1)
    )
    assert shared.optimizer == whole.optimizer // 4
    assert dataclasses.replace(shared, optimizer=whole.optimizer) == whole
    # of bf16: 2 bytes of weights, 4 of gradients, 12 / dp of optimizer
    assert shared.optimizer * 4 == pytest.approx(6 * shared.weights, rel=1e-6)
