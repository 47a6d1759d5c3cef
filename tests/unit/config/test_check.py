"""Rules that tie keys together: every message has the numbers and what would work."""

from typing import Any

import pytest
from refusals import make, refusal

from megalite.config import Config, ModelConfig, check, resolve
from megalite.config.check import valid_tp


def test_the_defaults_run_on_one_rank() -> None:
    check(resolve(Config(), 1), 1)


MESSAGES: list[tuple[int, dict[str, Any], str]] = [
    # model
    (
        1,
        {"model__num_heads": 8, "model__num_kv_heads": 3},
        "model.num_kv_heads=3 does not divide model.num_heads=8; use 1, 2, 4 or 8",
    ),
    (
        1,
        {"model__hidden_size": 100},
        "model.head_dim=25 (hidden_size 100 / num_heads 4) must be even for RoPE; "
        "set model.head_dim or change model.num_heads",
    ),
    (1, {"model__num_heads": 0}, "model.num_heads=0 must be at least 1 and at most 10000, e.g. 32"),
    (
        1,
        {"model__hidden_size": 3},
        "model.hidden_size=3 is not a multiple of model.num_heads=4; change one of them, or set model.head_dim",
    ),
    (
        1,
        {"model__position": "learned", "model__max_positions": 128},
        "train.seq_len=256 is more than model.max_positions=128 learned positions; "
        "use train.seq_len=128 or less, or model.position=rope",
    ),
    (
        1,
        {"model__position": "learned", "model__rope_scaling": "linear"},
        "model.rope_scaling=linear needs model.position=rope, not learned; use model.rope_scaling=none",
    ),
    (
        1,
        {"model__sliding_window": 64, "train__kernels": "fused"},
        "train.kernels=fused does not support model.sliding_window=64; use train.kernels=auto",
    ),
    (
        1,
        {"model__attention_dropout": 0.1, "train__kernels": "fused"},
        "train.kernels=fused does not support model.attention_dropout=0.1; "
        "use train.kernels=auto or model.attention_dropout=0",
    ),
    (1, {"model__dropout": 1.0}, "model.dropout=1.0 must be at least 0 and less than 1, e.g. 0.1"),
    (1, {"model__sliding_window": 0}, "model.sliding_window=0 must be at least 1 and at most 2147483647, e.g. 8192"),
    (
        1,
        {"model__rope_fraction": 0.1},
        "model.rope_fraction=0.1 rotates 3 of head_dim 32 features; it must be an even number of at least 2: "
        "e.g. model.rope_fraction=0.5",
    ),
    (
        1,
        {"model__rope_factor": 8.0},
        "model.rope_factor=8.0 has no effect with model.rope_scaling=none; "
        "use model.rope_scaling=linear, llama3 or yarn, or model.rope_factor=1",
    ),
    (
        1,
        {"model__rope_scaling": "yarn", "model__rope_factor": 4.0},
        "model.rope_scaling=yarn needs model.rope_original_max_positions, the context the model was trained on, "
        "e.g. 8192",
    ),
    (
        1,
        {"model__rope_low_freq_factor": 4.0},
        "model.rope_low_freq_factor=4.0 must be below model.rope_high_freq_factor=4.0",
    ),
    (1, {"model__rope_beta_slow": 40.0}, "model.rope_beta_slow=40.0 must be below model.rope_beta_fast=32.0"),
    (
        1,
        {"optim__label_smoothing": 1.0},
        "optim.label_smoothing=1.0 must be at least 0 and less than 1, e.g. 0.1",
    ),
    # topology
    (
        3,
        {"parallel__tp": 3, "model__num_heads": 8, "model__num_kv_heads": 8},
        "parallel.tp=3 does not divide model.num_heads=8; use 1, 2, 4 or 8",
    ),
    (
        4,
        {"parallel__tp": 4, "model__ffn_hidden_size": 350},
        "parallel.tp=4 does not divide model.ffn_hidden_size=350; use 1 or 2",
    ),
    (
        4,
        {"parallel__tp": 4, "model__num_heads": 12, "model__num_kv_heads": 6, "model__head_dim": 8},
        "parallel.tp=4 neither divides model.num_kv_heads=6 nor is a multiple of it; use 1 or 2",
    ),
    (
        2,
        {"parallel__pp": 2, "parallel__stages": (4, 0)},
        "parallel.stages=0 must be at least 1 and at most 1000, e.g. 8",
    ),
    (1, {"parallel__stages": ()}, "parallel.stages=[] is empty; use null, or e.g. parallel.stages=[9, 8, 8, 7]"),
    (
        2,
        {"parallel__pp": 2, "parallel__stages": (2, 3)},
        "parallel.stages=[2, 3] adds up to 5, model.num_layers=4; make them equal",
    ),
    (
        1,
        {"parallel__recompute_layers": 2},
        "parallel.recompute_layers=2 has no effect with parallel.recompute=none; "
        "use parallel.recompute=full or selective",
    ),
    (
        1,
        {"train__ramp_samples": 64},
        "train.ramp_start=0 with train.ramp_samples=64: a ramp needs both, from a multiple of micro_batch_size x "
        "dp = 4 of at most train.global_batch_size=32; use train.ramp_start=4, or 0 for both",
    ),
    (
        1,
        {"optim__lr_schedule": "inverse_sqrt"},
        "optim.lr_schedule=inverse_sqrt decays as sqrt(warmup_samples / samples); set optim.warmup_samples",
    ),
    (1, {"parallel__zero": 2}, "parallel.zero=2: only optimizer states can be sharded; use 0 or 1"),
    (2, {"parallel__cp": 2}, "parallel.cp=2: context parallelism is not supported yet; use parallel.cp=1"),
    (
        4,
        {"parallel__tp": 2, "parallel__dp": 1},
        "pp 1 x dp 1 x cp 1 x tp 2 = 2 ranks, but the world size is 4; use parallel.dp=2, or start 2 processes",
    ),
    (
        6,
        {"parallel__tp": 2, "parallel__pp": 2},
        "pp 2 x dp 1 x cp 1 x tp 2 = 4 ranks, but the world size is 6; "
        "start a multiple of 4 processes (e.g. 8), or lower parallel.tp or parallel.pp",
    ),
    (
        1,
        {"parallel__tp": 2},
        "pp 1 x dp 1 x cp 1 x tp 2 = 2 ranks, but the world size is 1 "
        "(without torchrun there is one: torchrun --nproc_per_node N ...); "
        "start a multiple of 2 processes (e.g. 2), or lower parallel.tp or parallel.pp",
    ),
    (
        4,
        {"parallel__tp": 4, "train__seq_len": 30},
        "parallel.sp needs train.seq_len=30 to be a multiple of parallel.tp=4; "
        "use train.seq_len=32 or parallel.sp=false",
    ),
    # batch
    (
        3,
        {"train__global_batch_size": 32, "train__micro_batch_size": 4},
        "train.global_batch_size=32 is not a multiple of train.micro_batch_size=4 x dp 3 = 12; "
        "use train.global_batch_size=24 or 36",
    ),
    (
        3,
        {"train__global_batch_size": 8, "train__micro_batch_size": 4},
        "train.global_batch_size=8 is not a multiple of train.micro_batch_size=4 x dp 3 = 12; "
        "use train.global_batch_size=12",
    ),
    (
        10**5,
        {"train__global_batch_size": 8, "train__micro_batch_size": 4},
        "train.global_batch_size=8 is not a multiple of train.micro_batch_size=4 x dp 100000 = 400000; "
        "use fewer ranks, or more for each replica",
    ),
    (
        1,
        {"optim__warmup_samples": 50, "optim__decay_samples": 20},
        "optim.warmup_samples=50 is more than optim.decay_samples=20 (train.steps 100 x global batch 32); lower it",
    ),
    # ranges
    (1, {"train__steps": 0}, "train.steps=0 must be at least 1 and at most 1e9, e.g. 1000"),
    (1, {"parallel__dp": 0}, "parallel.dp=0 must be at least 1 and at most 1e6, e.g. 8"),
    (1, {"optim__lr": -1.0}, "optim.lr=-1.0 must be 0, or at least 1e-12 and at most 10, e.g. 0.0003"),
    (1, {"model__rope_theta": 0.0}, "model.rope_theta=0.0 must be greater than 1 and at most 1e12, e.g. 10000"),
    (1, {"log__interval": 0}, "log.interval=0 must be at least 1 and at most 1e9, e.g. 10"),
    (1, {"optim__beta2": 1.0}, "optim.beta2=1.0 must be at least 0 and at most 0.999999, e.g. 0.9"),
    (1, {"data__valid_fraction": 1.0}, "data.valid_fraction=1.0 must be at least 0 and less than 1, e.g. 0.1"),
    (
        1,
        {"optim__lr": 0.1, "optim__min_lr": 0.2},
        "optim.min_lr=0.2 is above optim.lr=0.1; lower it or raise optim.lr",
    ),
    (
        1,
        {"data__valid": {"a/b": "x"}},
        "data.valid: 'a/b' is not a plain name; use at most 100 letters, digits, - and _",
    ),
    # combinations
    (
        1,
        {"optim__lr": 1.0, "optim__weight_decay": 1.0},
        "optim.lr=1.0 x optim.weight_decay=1.0 = 1 flips the sign of weights in each step; it must be less than 1: "
        "lower one of them",
    ),
    (
        1,
        {"train__steps": 10**9, "train__global_batch_size": 10**5, "train__seq_len": 2**20},
        "train.steps=1000000000 x train.global_batch_size=100000 x train.seq_len=1048576 = 1e+20 tokens, more than "
        "2^63 - 1 = 9.2e18; lower train.steps",
    ),
]


@pytest.mark.parametrize(("ranks", "keys", "message"), MESSAGES, ids=[m.split(" ")[0] for _, _, m in MESSAGES])
def test_messages(ranks: int, keys: dict[str, Any], message: str) -> None:
    assert refusal(ranks, **keys) == message


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (3, {"train__global_batch_size": 24}),
        (3, {"train__global_batch_size": 36}),
        (4, {"parallel__tp": 4, "train__seq_len": 32}),
        (4, {"parallel__tp": 4, "train__seq_len": 30, "parallel__sp": False}),
        (4, {"parallel__tp": 2, "parallel__dp": 2}),
        (8, {"parallel__tp": 2, "parallel__pp": 2}),
        (2, {"parallel__tp": 2, "model__ffn_hidden_size": 350}),
        (2, {"parallel__pp": 2, "parallel__stages": (1, 3)}),
        (3, {"parallel__tp": 3, "model__num_heads": 6, "model__num_kv_heads": 3, "model__head_dim": 8,
             "train__seq_len": 9, "model__ffn_hidden_size": 12, "train__global_batch_size": 12}),
    ],
)  # fmt: skip
def test_the_remedies_work(ranks: int, keys: dict[str, Any]) -> None:
    check(resolve(make(**keys), ranks), ranks)


@pytest.mark.parametrize(
    ("heads", "kv", "ffn", "expected"),
    [
        (8, 8, 64, [1, 2, 4, 8]),
        (8, 2, 64, [1, 2, 4, 8]),
        (8, 1, 64, [1, 2, 4, 8]),
        (12, 6, 144, [1, 2, 3, 6, 12]),
        (12, 4, 144, [1, 2, 4, 12]),
        (12, 1, 144, [1, 2, 3, 4, 6, 12]),
        (12, 1, 10, [1, 2]),
        (7, 7, 5, [1]),
    ],
)
def test_valid_tp(heads: int, kv: int, ffn: int, expected: list[int]) -> None:
    model = ModelConfig(num_heads=heads, num_kv_heads=kv, head_dim=2, ffn_hidden_size=ffn)
    assert valid_tp(model) == expected
