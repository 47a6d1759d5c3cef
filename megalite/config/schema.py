"""Every key a user can set, with its type, default and one line of help.

Values are strings, numbers and booleans, never classes. `None` means "chosen by megalite": `resolve` (resolved.py)
replaces each such value by a concrete one.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megalite.config.dtypes import DTYPES
from megalite.config.keys import MOST_LAYERS, SHARE, key
from megalite.config.model import ModelConfig
from megalite.config.schedules import SCHEDULES, nearest
from megalite.config.values import Range

MOST_STEPS = 10**9
MOST_BATCH = 10**5
MOST_THREADS = 1024
LARGEST_SEED = 2**63 - 1
LARGEST_LOSS_SCALE = 2.0**127  # the scaled loss is fp32: a larger scale makes every loss infinite
STEPS = Range(0, MOST_STEPS, 1000)
SAMPLES = Range(0, 10**15, 10**5)
DECAY = Range(0, 0.999999, 0.9)
TIMEOUT = Range(1, 7 * 86400, 600)


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh, and how the model is laid out on it: world size = pp x dp x cp x tp."""

    tp: int | None = key(None, "tensor-parallel ranks per replica; null: chosen", Range(1, 10**4, 8))
    pp: int | None = key(None, "pipeline ranks per replica; null: chosen", Range(1, MOST_LAYERS, 4))
    dp: int | None = key(None, "data-parallel replicas; null: world size / (tp pp cp)", Range(1, 10**6, 8))
    cp: int = key(1, "context-parallel ranks; only 1 is supported", Range(1, 10**4, 1))
    sp: bool = key(True, "sequence parallel: split norms and residuals along the sequence over tp")
    schedule: str = key("1f1b", "pipeline schedule", choices=tuple(SCHEDULES), near=nearest)
    chunks: int = key(1, "stages on each pipeline rank; interleaved needs 2 or more", Range(1, MOST_LAYERS, 2))
    stages: tuple[int, ...] | None = key(None, "layers on each stage; null: balanced", Range(1, MOST_LAYERS, 8))
    recompute: str = key(
        "none", "compute again in backward: the attention core, or blocks", choices=("none", "selective", "full")
    )
    recompute_layers: int = key(
        0, "number of layers of a stage, from the first, that recompute; 0: all", Range(0, MOST_LAYERS, 8)
    )
    overlap: bool = key(True, "reduce gradient buckets over dp during the backward pass")
    bucket_mb: float = key(25.0, "size of one gradient bucket in MiB", Range(1e-3, 10**5, 25))
    zero: int = key(0, "ZeRO stage; 1: shard optimizer states over replicas", Range(0, 3, 1))
    timeout_s: float = key(600.0, "end the run if a rank hangs for so many seconds", TIMEOUT)


@dataclass(frozen=True)
class DataConfig:
    """Indexed token files made by tools/preprocess_data.py. A path is the prefix of PREFIX.bin and PREFIX.idx.

    With `sft` the data are conversations: `valid` names files of them, and `valid_fraction` is a share of them.
    """

    path: str | None = key(None, "training data: the prefix printed by tools/preprocess_data.py", path="in")
    valid: Mapping[str, str] = key({}, "held-out sets, NAME: PREFIX; each is reported by name", path="in")
    valid_fraction: float = key(0.02, "share of the data held out if data.valid is empty", SHARE)
    tokenizer: str | None = key(
        None, "sentencepiece .model or tokenizer.json; null: the one that made the data", path="in"
    )
    isolate_documents: bool = key(False, "restart attention and positions at each document")
    sft: str | None = key(
        None,
        "instruction data instead of path: .jsonl, .json, .parquet, or a prefix made by tools/data.py sft",
        path="in",
    )
    template: str | None = key(
        None,
        "sft: chat template: built-in name (chatml, llama3, ...) or .jinja file; null: the tokenizer's own",
        path="in",
    )
    train_on: str = key(
        "assistant",
        "sft: tokens in the loss: of all assistant messages, of the last one, or all text",
        choices=("assistant", "last", "all"),
    )
    packing: bool = key(
        True, "sft: pack several conversations into a row, without attention between them; false: one per row"
    )
    overlong: str = key(
        "truncate_right",
        "sft: what to keep of a conversation longer than train.seq_len: beginning, end, or nothing",
        choices=("truncate_right", "truncate_left", "drop"),
    )
    control_tokens: str = key(
        "escape",
        "sft: control strings such as <|im_end|> in a message: made ordinary text, or kept, with or without a warning",
        choices=("escape", "warn", "allow"),
    )
    bad_rows: str = key("stop", "sft: what to do about a row that is not a conversation", choices=("stop", "skip"))
    reader: str = key("auto", "reader of indexed data", choices=("auto", "numpy", "cpp"))
    cache_dir: str = key(".cache/megalite", "folder for prepared data", path="out")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, AdamW (Loshchilov & Hutter 2019) by default, and its learning-rate curve, counted in samples."""

    name: str = key("adamw", "optimizer; muon: for hidden matrices", choices=("adamw", "apex_adamw", "muon"))
    lr: float = key(3e-4, "peak learning rate", Range(1e-12, 10, 3e-4, zero=True))
    min_lr: float = key(3e-5, "learning rate at the end of the decay", Range(1e-12, 10, 3e-5, zero=True))
    lr_schedule: str = key(
        "cosine", "shape of the learning-rate curve", choices=("constant", "linear", "cosine", "wsd", "inverse_sqrt")
    )
    wsd_decay_fraction: float = key(
        0.1, "wsd: share of decay_samples, at the end, in which lr falls", Range(0, 1, 0.1, above=True)
    )
    warmup_samples: int = key(0, "samples of linear warm-up from 0 to lr", SAMPLES)
    decay_samples: int | None = key(None, "samples until min_lr is reached; null: the end of the run", SAMPLES)
    lr_on_resume: str = key(
        "new", "learning-rate curve of a resumed run: from its keys, or the checkpoint's", choices=("new", "keep")
    )
    beta1: float = key(0.9, "decay of the first moment", DECAY)
    beta2: float = key(0.95, "decay of the second moment", DECAY)
    eps: float = key(1e-8, "added to the square root of the second moment", Range(1e-20, 1, 1e-8))
    weight_decay: float = key(0.1, "decoupled weight decay, of matrices only", Range(1e-9, 10, 0.1, zero=True))
    muon_momentum: float = key(0.95, "muon: decay of the momentum", DECAY)
    muon_lr_rule: str = key(
        "match_rms_adamw",
        "muon: how lr scales with a matrix's shape; match_rms_adamw suits AdamW's lr",
        choices=("match_rms_adamw", "original"),
    )
    groups: str = key(
        "", "settings by parameter name: 'PATTERN lr_scale=0.1 weight_decay=0; PATTERN ...'; first match wins"
    )
    clip_grad: float = key(
        1.0, "largest gradient norm; larger gradients are scaled down; 0: no limit", Range(1e-6, 10**6, 1, zero=True)
    )
    label_smoothing: float = key(0.0, "share of each label's probability spread over the vocabulary", SHARE)
    loss_scale_initial: float = key(
        1024.0, "fp16: loss scale of the first step", Range(2.0**-24, LARGEST_LOSS_SCALE, 1024)
    )
    loss_scale_window: int = key(
        1000, "fp16: steps without overflow until the loss scale doubles", Range(1, 10**9, 1000)
    )
    loss_scale_min: float = key(
        2.0**-10, "fp16: loss scale below which the run ends", Range(2.0**-24, LARGEST_LOSS_SCALE, 1)
    )


@dataclass(frozen=True)
class TuneConfig:
    """Which parameters are trained. Patterns use * and ? as in file names; separate several with spaces."""

    mode: str = key(
        "full",
        "full: all; lora: low-rank factors beside frozen linears; bitfit: biases; ffn_only: feed-forwards, no norms",
        choices=("full", "lora", "bitfit", "ffn_only"),
    )
    freeze: str = key("", "patterns of parameter names not to train, e.g. 'embed.* layers.0.*'")
    lora_targets: str = key(
        "", "patterns of linears, e.g. 'attn.qkv mlp.down', 'q_proj v_proj', 'layers.3.*'; empty: all of the blocks"
    )
    lora_rank: int = key(16, "rank r of the factors (peft r)", Range(1, 10**4, 16))
    lora_alpha: float = key(32.0, "the factors' product is scaled by lora_alpha / lora_rank", Range(1e-3, 10**5, 32))
    lora_dropout: float = key(0.0, "dropout of the factors' input (peft lora_dropout)", SHARE)


@dataclass(frozen=True)
class TrainConfig:
    """The loop: global_batch_size = micro_batch_size x microbatches x dp."""

    run_dir: str = key("runs/default", "folder for configuration, metrics, checkpoints and plot", path="out")
    steps: int = key(100, "optimizer steps of the whole run", Range(1, MOST_STEPS, 1000))
    epochs: float | None = key(None, "passes over the data, instead of steps", Range(0, 10**6, 3, above=True))
    seq_len: int = key(256, "tokens of one sample", Range(1, 2**24, 4096))
    micro_batch_size: int = key(4, "samples per forward pass, on each replica", Range(1, MOST_BATCH, 4))
    global_batch_size: int = key(32, "samples per optimizer step, over all replicas", Range(1, MOST_BATCH, 256))
    ramp_start: int = key(0, "with ramp_samples: samples of the first optimizer step", Range(0, MOST_BATCH, 32))
    ramp_samples: int = key(0, "samples over which a step grows to global_batch_size; 0: no ramp", SAMPLES)
    skip_samples: str = key("", "samples FIRST:END,FIRST:END whose batches are skipped")
    seed: int = key(1234, "seed of initial weights and sample order", Range(0, LARGEST_SEED, 1234))
    dtype: str = key(
        "fp32",
        "dtype of weights and activations; bf16 and fp16 keep fp32 master weights, fp16 scales the loss",
        choices=tuple(DTYPES),
    )
    device: str = key("auto", "auto: cuda if there is a GPU", choices=("auto", "cpu", "cuda"))
    kernels: str = key(
        "auto", "auto: fused RoPE, torch's attention; by name: RoPE and softmax", choices=("auto", "fused", "torch")
    )
    threads: int = key(
        0, "CPU threads of one rank; 0: cores / local ranks, or OMP_NUM_THREADS", Range(0, MOST_THREADS, 8)
    )
    eval_interval: int = key(0, "steps between held-out evaluations; 0: only first and last", STEPS)
    eval_samples: int = key(0, "samples of each held-out set per evaluation, evenly spread; 0: all", SAMPLES)
    eval_only: bool = key(False, "evaluate the loaded weights, then end")
    patience: int = key(0, "stop after this many evaluations without a better mean held-out loss; 0: never", STEPS)
    time_limit_s: float = key(0.0, "save and stop after this many seconds; 0: no limit", Range(0, 10**9, 3600))
    export_hf: str | None = key(None, "write a Hugging Face model to this new folder at the end", path="out")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are saved under train.run_dir and can be loaded at any topology."""

    interval: int = key(0, "steps between checkpoints; 0: only at the end", STEPS)
    keep: int = key(2, "number of newest checkpoints to keep; 0: all", STEPS)
    keep_every: int = key(0, "also keep checkpoints whose step is a multiple of this; 0: none", STEPS)
    async_save: bool = key(True, "copy to host memory and write while training continues; false: training waits")
    on_failure: str = key(
        "stop",
        "if a checkpoint cannot be written: stop the run, or warn and try again at the next one",
        choices=("stop", "continue"),
    )
    verify: bool = key(True, "check the checksum of every block that is loaded")
    resume: str = key("auto", "continue from the newest checkpoint in train.run_dir", choices=("auto", "never", "must"))
    load: str | None = key(None, "start from this checkpoint or run folder instead of fresh weights", path="in")
    load_optim: bool = key(True, "with load: load optimizer state and counters too, not only weights")


@dataclass(frozen=True)
class LogConfig:
    interval: int = key(10, "steps between log lines; the progress line is updated every step", Range(1, 10**9, 10))
    plot: bool = key(True, "write loss.png at the end (needs matplotlib)")
    tensorboard: bool = key(False, "also write TensorBoard events (needs tensorboard)")
    trace_step: int = key(0, "step whose trace is written to trace-rank-NNNNN.json (for Perfetto); 0: none", STEPS)


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@cache
def hints_of(cls: type) -> dict[str, Any]:
    return dict(typing.get_type_hints(cls))


SECTIONS: dict[str, type] = hints_of(Config)
