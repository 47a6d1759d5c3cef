"""Every key a user can set, with its type, default and one line of help.

Values are strings, numbers and booleans, never classes. `None` means "chosen by megalite": `resolve` (check.py)
replaces each such value by a concrete one.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from megalite.config.values import Range
from megalite.pipeline.schedule import SCHEDULES, nearest

MOST_LAYERS = 1000  # what planning is quick for; the deepest models known have 126 to 1000
MOST_STEPS = 10**9
MOST_BATCH = 10**5
MOST_THREADS = 1024
LARGEST_SEED = 2**63 - 1
LARGEST_LOSS_SCALE = 2.0**127  # the scaled loss is fp32: a larger scale makes every loss infinite
STEPS = Range(0, MOST_STEPS, 1000)
SAMPLES = Range(0, 10**15, 10**5)
POSITIONS = Range(1, 2**31 - 1, 8192)
SHARE = Range(0, 1, 0.1, below=True)
DECAY = Range(0, 0.999999, 0.9)
TIMEOUT = Range(1, 7 * 86400, 600)
TURNS = Range(0, 10**6, 4, above=True)


def _key(default: Any, help: str, range: Range | None = None, *, path: str = "", **names: Any) -> Any:
    """A key. `range`: of each number. `path`: "in" is read, "out" written. `near`: the choice another text may mean."""
    metadata = {"help": help, "choices": (), "near": None, "range": range, "path": path, **names}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, Llama's by default. Names follow Megatron; where Hugging Face's differ they stand in the help."""

    vocab_size: int = _key(600, "number of token ids; unpadded, padding belongs to the cut", Range(1, 2**24, 32000))
    hidden_size: int = _key(128, "width h of the residual stream", Range(1, 10**6, 4096))
    num_layers: int = _key(4, "number of transformer blocks (HF num_hidden_layers)", Range(1, MOST_LAYERS, 32))
    num_heads: int = _key(4, "query heads (HF num_attention_heads)", Range(1, 10**4, 32))
    num_kv_heads: int | None = _key(None, "key/value heads, 1 is MQA; null: num_heads", Range(1, 10**4, 8))
    head_dim: int | None = _key(None, "size of one head; null: hidden_size / num_heads", Range(1, 10**4, 128))
    ffn_hidden_size: int = _key(352, "feed-forward width (HF intermediate_size)", Range(1, 10**7, 11008))
    norm_eps: float = _key(1e-5, "epsilon of the norms (HF rms_norm_eps, layer_norm_eps)", Range(1e-12, 0.1, 1e-5))
    rope_theta: float = _key(10000.0, "base of the rotary position embedding", Range(1, 1e12, 10000, above=True))
    tie_embeddings: bool = _key(False, "one matrix for input embedding and output head (HF tie_word_embeddings)")
    qkv_bias: bool = _key(False, "bias on the query/key/value projection (Qwen2)")
    qk_norm: bool = _key(False, "RMSNorm on each query and key head before RoPE (Qwen3)")
    init_std: float = _key(0.02, "std of new weights; residual outputs: / sqrt(2 num_layers)", Range(1e-6, 10, 0.02))
    norm: str = _key("rmsnorm", "norm of the residual stream; layernorm has a bias", choices=("rmsnorm", "layernorm"))
    activation: str = _key(
        "swiglu",
        "feed-forward (HF hidden_act silu, gelu, gelu_new); the last two have no gate",
        choices=("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"),
    )
    position: str = _key("rope", "rotary, or GPT-2's learned position embedding", choices=("rope", "learned"))
    max_positions: int | None = _key(
        None, "rows of a learned position embedding (HF n_positions); null: train.seq_len", POSITIONS
    )
    family: str | None = _key(None, "names and layout on disk; null: by position", choices=("llama", "gpt2"))
    linear_bias: bool = _key(False, "bias on every linear of a block (HF attention_bias and mlp_bias; GPT-2)")
    rope_fraction: float = _key(1.0, "share of a head rotated (HF partial_rotary_factor)", Range(0, 1, 0.5, above=True))
    rope_scaling: str = _key(
        "none", "frequencies for long contexts (HF rope_type)", choices=("none", "linear", "llama3", "yarn")
    )
    rope_factor: float = _key(1.0, "how many times longer the context becomes (HF factor)", Range(1, 10**6, 8))
    rope_original_max_positions: int | None = _key(
        None, "context before it is stretched; llama3 and yarn need it (HF original_max_position_embeddings)", POSITIONS
    )
    rope_low_freq_factor: float = _key(1.0, "llama3: turns below which a wave is slowed (HF low_freq_factor)", TURNS)
    rope_high_freq_factor: float = _key(4.0, "llama3: turns above which a wave is kept (HF high_freq_factor)", TURNS)
    rope_beta_fast: float = _key(32.0, "yarn: turns above which a wave is kept (HF beta_fast)", TURNS)
    rope_beta_slow: float = _key(1.0, "yarn: turns below which a wave is slowed (HF beta_slow)", TURNS)
    rope_mscale: float = _key(0.0, "yarn: weight of the attention factor (HF mscale)", Range(0, 100, 1))
    rope_mscale_all_dim: float = _key(0.0, "yarn: divisor; 0: paper's factor (HF mscale_all_dim)", Range(0, 100, 1))
    dropout: float = _key(0.0, "of embeddings and residual branches (HF embd_pdrop, resid_pdrop)", SHARE)
    attention_dropout: float = _key(0.0, "of attention probabilities (HF attention_dropout, attn_pdrop)", SHARE)
    sliding_window: int | None = _key(None, "keys a query sees, itself included; null: all", POSITIONS)
    from_hf: str | None = _key(None, "start from this Hugging Face folder: its config.json is the model", path="in")
    add_tokens: tuple[str, ...] = _key((), "control tokens to add to data.tokenizer, e.g. [<|im_start|>, <|im_end|>]")

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies by a gate."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh and how the model is laid on it: world size = pp x dp x cp x tp."""

    tp: int | None = _key(None, "tensor-parallel ranks per replica; null: chosen", Range(1, 10**4, 8))
    pp: int | None = _key(None, "pipeline ranks per replica; null: chosen", Range(1, MOST_LAYERS, 4))
    dp: int | None = _key(None, "data-parallel replicas; null: world size / (tp pp cp)", Range(1, 10**6, 8))
    cp: int = _key(1, "context-parallel ranks; only 1 for now, the axis of the mesh exists", Range(1, 10**4, 1))
    sp: bool = _key(True, "sequence parallel: shard norms and residuals over tp along the sequence")
    schedule: str = _key("1f1b", "pipeline schedule", choices=tuple(SCHEDULES), near=nearest)
    chunks: int = _key(1, "stages on each pipeline rank; interleaved needs 2 or more", Range(1, MOST_LAYERS, 2))
    stages: tuple[int, ...] | None = _key(None, "layers on each stage; null: balanced", Range(1, MOST_LAYERS, 8))
    recompute: str = _key(
        "none", "compute again in backward: the attention core, or blocks", choices=("none", "selective", "full")
    )
    recompute_layers: int = _key(0, "first layers of a stage that recompute; 0: all", Range(0, MOST_LAYERS, 8))
    overlap: bool = _key(True, "sum gradient buckets over dp while the backward still computes")
    bucket_mb: float = _key(25.0, "size of one gradient bucket in MiB", Range(1e-3, 10**5, 25))
    zero: int = _key(0, "1: optimizer states are divided over replicas (ZeRO stage 1)", Range(0, 3, 1))
    timeout_s: float = _key(600.0, "seconds after which a rank that hangs or is stopped ends the run", TIMEOUT)


@dataclass(frozen=True)
class DataConfig:
    """Indexed token files made by tools/preprocess_data.py. A path is the prefix of PREFIX.bin and PREFIX.idx.

    With `sft` the data is conversations; `valid` then names files of them, and `valid_fraction` counts conversations.
    """

    path: str | None = _key(None, "training data: the prefix printed by tools/preprocess_data.py", path="in")
    valid: Mapping[str, str] = _key({}, "held-out sets, NAME: PREFIX, each reported by name", path="in")
    valid_fraction: float = _key(0.02, "share of data.path held out, from its end, if data.valid is empty", SHARE)
    tokenizer: str | None = _key(None, "sentencepiece .model or tokenizer.json; null: that of the data", path="in")
    isolate_documents: bool = _key(False, "attention and positions restart at each document")
    sft: str | None = _key(
        None,
        "instruction data in place of path: .jsonl, .json, .parquet, or a prefix made by tools/data.py sft",
        path="in",
    )
    template: str | None = _key(
        None,
        "sft: chat template: built-in name (chatml, llama3, ...) or .jinja file; null: the tokenizer's own",
        path="in",
    )
    train_on: str = _key(
        "assistant",
        "sft: what counts in the loss: the assistant's messages, the last of them, all text",
        choices=("assistant", "last", "all"),
    )
    packing: bool = _key(True, "sft: several conversations in a row, none of which sees another; false: one a row")
    overlong: str = _key(
        "truncate_right",
        "sft: of a conversation longer than train.seq_len keep the beginning, the end, or nothing",
        choices=("truncate_right", "truncate_left", "drop"),
    )
    control_tokens: str = _key(
        "escape",
        "sft: control strings as <|im_end|> inside a message: made ordinary text, or left, with or without a word",
        choices=("escape", "warn", "allow"),
    )
    bad_rows: str = _key("stop", "sft: what a row that is no conversation does", choices=("stop", "skip"))
    reader: str = _key("auto", "reader of indexed data", choices=("auto", "numpy", "cpp"))
    cache_dir: str = _key(".cache/megalite", "where prepared data is kept", path="out")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, AdamW (Loshchilov & Hutter 2019) by default, and its learning-rate curve, counted in samples."""

    name: str = _key("adamw", "optimizer; muon: for hidden matrices", choices=("adamw", "apex_adamw", "muon"))
    lr: float = _key(3e-4, "peak learning rate", Range(1e-12, 10, 3e-4, zero=True))
    min_lr: float = _key(3e-5, "learning rate at the end of the decay", Range(1e-12, 10, 3e-5, zero=True))
    lr_schedule: str = _key(
        "cosine", "shape of the decay", choices=("constant", "linear", "cosine", "wsd", "inverse_sqrt")
    )
    wsd_decay_fraction: float = _key(
        0.1, "wsd: last share of decay_samples, in which lr falls", Range(0, 1, 0.1, above=True)
    )
    warmup_samples: int = _key(0, "samples of linear warm-up from 0 to lr", SAMPLES)
    decay_samples: int | None = _key(None, "samples until min_lr is reached; null: the end of the run", SAMPLES)
    lr_on_resume: str = _key(
        "new", "curve of a resumed run: that of its keys, or the checkpoint's", choices=("new", "keep")
    )
    beta1: float = _key(0.9, "decay of the first moment", DECAY)
    beta2: float = _key(0.95, "decay of the second moment", DECAY)
    eps: float = _key(1e-8, "added to the root of the second moment", Range(1e-20, 1, 1e-8))
    weight_decay: float = _key(0.1, "decoupled weight decay of matrices alone", Range(1e-9, 10, 0.1, zero=True))
    muon_momentum: float = _key(0.95, "muon: decay of the momentum", DECAY)
    muon_lr_rule: str = _key(
        "match_rms_adamw",
        "muon: how lr grows with a matrix; match_rms_adamw suits AdamW's lr",
        choices=("match_rms_adamw", "original"),
    )
    groups: str = _key("", "by parameter name: 'PATTERN lr_scale=0.1 weight_decay=0; PATTERN ...', first match counts")
    clip_grad: float = _key(
        1.0, "norm above which gradients are scaled down; 0: never", Range(1e-6, 10**6, 1, zero=True)
    )
    label_smoothing: float = _key(0.0, "share of each label spread over the vocabulary", SHARE)
    loss_scale_initial: float = _key(
        1024.0, "fp16: loss scale of the first step", Range(2.0**-24, LARGEST_LOSS_SCALE, 1024)
    )
    loss_scale_window: int = _key(1000, "fp16: steps without overflow until it doubles", Range(1, 10**9, 1000))
    loss_scale_min: float = _key(
        2.0**-10, "fp16: loss scale below which the run ends", Range(2.0**-24, LARGEST_LOSS_SCALE, 1)
    )


@dataclass(frozen=True)
class TuneConfig:
    """What of the model is trained. A pattern has * and ? as in file names; several are divided by spaces."""

    mode: str = _key(
        "full",
        "full: all; lora: low-rank factors beside frozen linears; bitfit: biases; ffn_only: feed-forwards, no norms",
        choices=("full", "lora", "bitfit", "ffn_only"),
    )
    freeze: str = _key("", "patterns of parameter names that are not trained, e.g. 'embed.* layers.0.*'")
    lora_targets: str = _key(
        "", "patterns of linears, e.g. 'attn.qkv mlp.down', 'q_proj v_proj', 'layers.3.*'; empty: all of the blocks"
    )
    lora_rank: int = _key(16, "rank r of the factors (peft r)", Range(1, 10**4, 16))
    lora_alpha: float = _key(32.0, "their product is scaled by lora_alpha / lora_rank", Range(1e-3, 10**5, 32))
    lora_dropout: float = _key(0.0, "dropout on what goes into the factors (peft lora_dropout)", SHARE)


@dataclass(frozen=True)
class TrainConfig:
    """The loop: global_batch_size = micro_batch_size x microbatches x dp."""

    run_dir: str = _key("runs/default", "folder of config, metrics, checkpoints, plot", path="out")
    steps: int = _key(100, "optimizer steps of the whole run", Range(1, MOST_STEPS, 1000))
    epochs: float | None = _key(None, "passes over the data, in place of steps", Range(0, 10**6, 3, above=True))
    seq_len: int = _key(256, "tokens of one sample", Range(1, 2**24, 4096))
    micro_batch_size: int = _key(4, "samples of one forward", Range(1, MOST_BATCH, 4))
    global_batch_size: int = _key(32, "samples of one optimizer step, over all replicas", Range(1, MOST_BATCH, 256))
    ramp_start: int = _key(0, "with ramp_samples: samples of the first optimizer step", Range(0, MOST_BATCH, 32))
    ramp_samples: int = _key(0, "samples over which a step grows to global_batch_size; 0: no ramp", SAMPLES)
    skip_samples: str = _key("", "samples FIRST:END,FIRST:END whose batches are passed over and change no weight")
    seed: int = _key(1234, "of initial weights and sample order", Range(0, LARGEST_SEED, 1234))
    dtype: str = _key(
        "fp32",
        "of weights and activations; bf16 and fp16 keep fp32 masters, fp16 scales the loss",
        choices=("fp32", "bf16", "fp16", "fp64"),
    )
    device: str = _key("auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    kernels: str = _key(
        "auto", "auto: fused RoPE, torch's attention; by name: RoPE and softmax", choices=("auto", "fused", "torch")
    )
    threads: int = _key(
        0, "CPU threads of one rank; 0: cores / local ranks, or OMP_NUM_THREADS", Range(0, MOST_THREADS, 8)
    )
    eval_interval: int = _key(0, "steps between held-out evaluations; 0: only first and last", STEPS)
    eval_samples: int = _key(0, "samples of each held-out set, evenly spread over it; 0: all of it", SAMPLES)
    eval_only: bool = _key(False, "evaluate the loaded weights and end")
    patience: int = _key(0, "stop after so many evaluations without a better mean held-out loss; 0: never", STEPS)
    time_limit_s: float = _key(0.0, "save and stop cleanly after so many seconds; 0: none", Range(0, 10**9, 3600))
    export_hf: str | None = _key(None, "at the end write a Hugging Face model to this new folder", path="out")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints are written under train.run_dir and load at any topology."""

    interval: int = _key(0, "steps between checkpoints; 0: only at the end", STEPS)
    keep: int = _key(2, "newest checkpoints kept; 0: all", STEPS)
    keep_every: int = _key(0, "checkpoints whose step is a multiple of this are kept for good; 0: none", STEPS)
    async_save: bool = _key(True, "copy to host memory and write while training goes on; false: training waits")
    on_failure: str = _key(
        "stop",
        "when a checkpoint cannot be written; continue: say so, try again later",
        choices=("stop", "continue"),
    )
    verify: bool = _key(True, "hold every block that is loaded against its checksum")
    resume: str = _key("auto", "go on with what train.run_dir holds", choices=("auto", "never", "must"))
    load: str | None = _key(None, "start from this checkpoint or run folder instead of fresh weights", path="in")
    load_optim: bool = _key(True, "with load: take optimizer state and counters too, not the weights alone")


@dataclass(frozen=True)
class LogConfig:
    interval: int = _key(10, "steps between log lines; the progress line is live anyway", Range(1, 10**9, 10))
    plot: bool = _key(True, "write loss.png at the end (needs matplotlib)")
    tensorboard: bool = _key(False, "also write TensorBoard events (needs tensorboard)")
    trace_step: int = _key(0, "step whose trace is written to trace-rank-NNNNN.json, for Perfetto; 0: none", STEPS)


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
