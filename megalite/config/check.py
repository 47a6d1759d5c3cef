"""All rules between keys, and between keys and the number of ranks. Messages give the numbers and what would work."""

from __future__ import annotations

from collections.abc import Iterable

from megalite.config.batch import skipped_ranges
from megalite.config.errors import ConfigError
from megalite.config.model import ResolvedModel
from megalite.config.param_groups import check_groups
from megalite.config.pipeline_rules import microbatch_fault, stage_fault
from megalite.config.resolved import Resolved
from megalite.config.schema import MOST_BATCH, ModelConfig, TuneConfig
from megalite.config.values import check_values, shown


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _either(values: Iterable[int]) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def valid_tp(model: ModelConfig) -> list[int]:
    """Tensor-parallel sizes: they divide the query heads, and divide or are a multiple of the kv heads."""
    kv = model.num_kv_heads or model.num_heads
    return [
        tp
        for tp in range(1, model.num_heads + 1)
        if model.num_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0) and model.ffn_hidden_size % tp == 0
    ]


def check(config: Resolved, world_size: int) -> None:
    """Raise ConfigError if a resolved `config` cannot run on `world_size` ranks."""
    check_values(config)
    _check_model(config)
    _check_topology(config, world_size)
    _check_batch(config)
    _check_optim(config)
    _check_tune(config)
    _check_data(config)


def _check_model(config: Resolved) -> None:
    m = config.model
    divisors = [k for k in range(1, m.num_heads + 1) if m.num_heads % k == 0]
    _require(
        m.num_heads % m.num_kv_heads == 0,
        f"model.num_kv_heads={m.num_kv_heads} does not divide model.num_heads={m.num_heads}; use {_either(divisors)}",
    )
    if m.position == "rope":
        _check_rope(m)
    else:
        _require(
            config.train.seq_len <= m.learned_positions,
            f"train.seq_len={config.train.seq_len} is more than model.max_positions={m.max_positions} learned "
            f"positions; use train.seq_len={m.max_positions} or less"
            + (", or model.position=rope" if m.from_hf is None else ""),
        )
        _require(
            m.rope_scaling == "none",
            f"model.rope_scaling={m.rope_scaling} needs model.position=rope, not {m.position}; "
            f"use model.rope_scaling=none",
        )
    _require(
        m.attention_dropout == 0 or config.train.kernels != "fused",
        f"train.kernels=fused does not support model.attention_dropout={m.attention_dropout}; "
        f"use train.kernels=auto or model.attention_dropout=0",
    )
    _require(
        m.sliding_window is None or config.train.kernels != "fused",
        f"train.kernels=fused does not support model.sliding_window={m.sliding_window}; use train.kernels=auto",
    )


def _check_rope(m: ResolvedModel) -> None:
    _require(
        m.head_dim % 2 == 0,
        f"model.head_dim={m.head_dim} (hidden_size {m.hidden_size} / num_heads {m.num_heads}) must be even for RoPE; "
        f"set model.head_dim or change model.num_heads",
    )
    rotated = int(m.head_dim * m.rope_fraction)
    _require(
        rotated >= 2 and rotated % 2 == 0,
        f"model.rope_fraction={m.rope_fraction} rotates {rotated} of head_dim {m.head_dim} features; it must be "
        f"an even number of at least 2: e.g. model.rope_fraction={max(2, m.head_dim // 4 * 2) / m.head_dim:g}",
    )
    _require(
        m.rope_scaling != "none" or m.rope_factor == 1,
        f"model.rope_factor={m.rope_factor} has no effect with model.rope_scaling=none; "
        f"use model.rope_scaling=linear, llama3 or yarn, or model.rope_factor=1",
    )
    _require(
        m.rope_scaling not in ("llama3", "yarn") or m.rope_original_max_positions is not None,
        f"model.rope_scaling={m.rope_scaling} needs model.rope_original_max_positions, the context the model was "
        f"trained on, e.g. 8192",
    )
    low, high = m.rope_low_freq_factor, m.rope_high_freq_factor
    _require(low < high, f"model.rope_low_freq_factor={low} must be below model.rope_high_freq_factor={high}")
    slow, fast = m.rope_beta_slow, m.rope_beta_fast
    _require(slow < fast, f"model.rope_beta_slow={slow} must be below model.rope_beta_fast={fast}")


def _check_topology(config: Resolved, world_size: int) -> None:
    m, p = config.model, config.parallel
    allowed = valid_tp(m)
    for name, size in (("num_heads", m.num_heads), ("ffn_hidden_size", m.ffn_hidden_size)):
        _require(size % p.tp == 0, f"parallel.tp={p.tp} does not divide model.{name}={size}; use {_either(allowed)}")
    _require(
        p.tp in allowed,
        f"parallel.tp={p.tp} neither divides model.num_kv_heads={m.num_kv_heads} nor is a multiple of it; "
        f"use {_either(allowed)}",
    )
    fault = stage_fault(config)
    _require(not fault, fault)
    _require(
        p.recompute_layers == 0 or p.recompute != "none",
        f"parallel.recompute_layers={p.recompute_layers} has no effect with parallel.recompute=none; "
        f"use parallel.recompute=full or selective",
    )
    _require(p.zero in (0, 1), f"parallel.zero={p.zero}: only optimizer states can be sharded; use 0 or 1")
    _require(p.cp == 1, f"parallel.cp={p.cp}: context parallelism is not supported yet; use parallel.cp=1")
    product = p.pp * p.dp * p.cp * p.tp
    if product != world_size:
        model_ranks = p.pp * p.cp * p.tp
        if world_size % model_ranks == 0:
            remedy = f"use parallel.dp={world_size // model_ranks}, or start {product} processes"
        else:
            more = -(-world_size // model_ranks) * model_ranks
            remedy = f"start a multiple of {model_ranks} processes (e.g. {more}), or lower parallel.tp or parallel.pp"
        start = "" if world_size > 1 else " (without torchrun there is one: torchrun --nproc_per_node N ...)"
        raise ConfigError(
            f"pp {p.pp} x dp {p.dp} x cp {p.cp} x tp {p.tp} = {product} ranks, "
            f"but the world size is {world_size}{start}; {remedy}"
        )
    if p.sp:
        seq = config.train.seq_len
        _require(
            seq % p.tp == 0,
            f"parallel.sp needs train.seq_len={seq} to be a multiple of parallel.tp={p.tp}; "
            f"use train.seq_len={-(-seq // p.tp) * p.tp} or parallel.sp=false",
        )


def _check_batch(config: Resolved) -> None:
    t, dp = config.train, config.parallel.dp
    unit = t.micro_batch_size * dp
    if t.global_batch_size % unit:
        lower, upper = t.global_batch_size // unit * unit, -(-t.global_batch_size // unit) * unit
        sizes = [n for n in (lower, upper) if 0 < n <= MOST_BATCH]
        remedy = (
            f"use train.global_batch_size={_either(sizes)}" if sizes else "use fewer ranks, or more for each replica"
        )
        raise ConfigError(
            f"train.global_batch_size={t.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{t.micro_batch_size} x dp {dp} = {unit}; {remedy}"
        )
    fault = microbatch_fault(config)
    _require(not fault, fault)
    if t.ramp_start or t.ramp_samples:
        _require(
            t.ramp_samples > 0 and 0 < t.ramp_start <= t.global_batch_size and t.ramp_start % unit == 0,
            f"train.ramp_start={t.ramp_start} with train.ramp_samples={t.ramp_samples}: a ramp needs both, from "
            f"a multiple of micro_batch_size x dp = {unit} of at most train.global_batch_size={t.global_batch_size}; "
            f"use train.ramp_start={unit}, or 0 for both",
        )
    tokens = t.steps * t.global_batch_size * t.seq_len
    _require(
        tokens < 2**63,
        f"train.steps={t.steps} x train.global_batch_size={t.global_batch_size} x train.seq_len={t.seq_len} = "
        f"{tokens:.2g} tokens, more than 2^63 - 1 = 9.2e18; lower train.steps",
    )
    decay, warmup = config.optim.decay_samples, config.optim.warmup_samples
    _require(
        warmup <= decay,
        f"optim.warmup_samples={warmup} is more than optim.decay_samples={decay} "
        f"(train.steps {t.steps} x global batch {t.global_batch_size}); lower it",
    )


def _check_optim(config: Resolved) -> None:
    o = config.optim
    _require(o.min_lr <= o.lr, f"optim.min_lr={o.min_lr} is above optim.lr={o.lr}; lower it or raise optim.lr")
    _require(
        o.lr * o.weight_decay < 1,
        f"optim.lr={o.lr} x optim.weight_decay={o.weight_decay} = {o.lr * o.weight_decay:g} flips the sign of "
        f"weights in each step; it must be less than 1: lower one of them",
    )
    _require(
        o.lr_schedule != "inverse_sqrt" or o.warmup_samples > 0,
        "optim.lr_schedule=inverse_sqrt decays as sqrt(warmup_samples / samples); set optim.warmup_samples",
    )
    _require(
        o.loss_scale_min <= o.loss_scale_initial,
        f"optim.loss_scale_min={o.loss_scale_min} must not be above optim.loss_scale_initial={o.loss_scale_initial}",
    )


def _check_tune(config: Resolved) -> None:
    t, base = config.tune, config.checkpoint.load or config.model.from_hf
    for key in ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout"):
        value = getattr(t, key)
        _require(
            t.mode == "lora" or value == getattr(TuneConfig(), key),
            f"tune.{key}={value} has no effect with tune.mode={t.mode}; set tune.mode=lora too",
        )
    _require(
        t.mode != "lora" or base is not None,
        "tune.mode=lora trains factors beside the weights of a trained model; name it with checkpoint.load=RUN or "
        "model.from_hf=DIR",
    )
    shapes = config.shapes  # raises if a pattern of tune matches nothing
    _require(
        config.optim.name != "muon" or bool(shapes.hidden),
        f"optim.name=muon is for hidden matrices, and tune.mode={t.mode}"
        + (f" with tune.freeze={t.freeze}" if t.freeze else "")
        + " trains none; use optim.name=adamw",
    )
    check_groups(config.optim, [*shapes.model, *shapes.factors])


def _check_data(config: Resolved) -> None:
    d = config.data
    _require(
        d.path is None or d.sft is None,
        f"data.path={d.path} and data.sft={d.sft} are both set; set one of them",
    )
    skipped_ranges(config.train.skip_samples)
    _require(
        config.model.from_hf is None or config.checkpoint.load is None,
        f"model.from_hf={config.model.from_hf} and checkpoint.load={config.checkpoint.load} both name the weights to "
        f"start from; set one of them",
    )
    for name in config.data.valid:
        _require(
            name.replace("_", "").replace("-", "").isalnum() and len(name) <= 100,
            f"data.valid: {shown(name)!r} is not a plain name; use at most 100 letters, digits, - and _",
        )
