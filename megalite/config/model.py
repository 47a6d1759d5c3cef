"""The keys of the model, and the model with every key chosen, which all that computes with a model takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from megalite.config.errors import ConfigError
from megalite.config.keys import MOST_LAYERS, POSITIONS, SHARE, TURNS, Complete, key, rule_of, values_of
from megalite.config.values import Range


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, Llama's by default. Names follow Megatron; the help gives Hugging Face's where they differ."""

    vocab_size: int = key(600, "number of token ids, without padding", Range(1, 2**24, 32000))
    hidden_size: int = key(128, "hidden size: width of the residual stream", Range(1, 10**6, 4096))
    num_layers: int = key(4, "number of transformer blocks (HF num_hidden_layers)", Range(1, MOST_LAYERS, 32))
    num_heads: int = key(4, "query heads (HF num_attention_heads)", Range(1, 10**4, 32))
    num_kv_heads: int | None = key(None, "key/value heads, 1 is MQA; null: num_heads", Range(1, 10**4, 8))
    head_dim: int | None = key(None, "size of one head; null: hidden_size / num_heads", Range(1, 10**4, 128))
    ffn_hidden_size: int = key(352, "feed-forward width (HF intermediate_size)", Range(1, 10**7, 11008))
    norm_eps: float = key(1e-5, "epsilon of the norms (HF rms_norm_eps, layer_norm_eps)", Range(1e-12, 0.1, 1e-5))
    rope_theta: float = key(10000.0, "base of the rotary position embedding", Range(1, 1e12, 10000, above=True))
    tie_embeddings: bool = key(False, "one matrix for input embedding and output head (HF tie_word_embeddings)")
    qkv_bias: bool = key(False, "bias on the query/key/value projection (Qwen2)")
    qk_norm: bool = key(False, "RMSNorm on each query and key head before RoPE (Qwen3)")
    init_std: float = key(0.02, "std of new weights; residual outputs: / sqrt(2 num_layers)", Range(1e-6, 10, 0.02))
    norm: str = key("rmsnorm", "norm; layernorm has a bias", choices=("rmsnorm", "layernorm"))
    activation: str = key(
        "swiglu",
        "feed-forward (HF hidden_act silu, gelu, gelu_new); the last two have no gate",
        choices=("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"),
    )
    position: str = key("rope", "rotary positions, or a learned embedding as in GPT-2", choices=("rope", "learned"))
    max_positions: int | None = key(
        None, "rows of a learned position embedding (HF n_positions); null: train.seq_len", POSITIONS
    )
    family: str | None = key(None, "names and layout on disk; null: by position", choices=("llama", "gpt2"))
    linear_bias: bool = key(False, "bias on every linear of a block (HF attention_bias and mlp_bias; GPT-2)")
    rope_fraction: float = key(
        1.0, "fraction of each head that is rotated (HF partial_rotary_factor)", Range(0, 1, 0.5, above=True)
    )
    rope_scaling: str = key(
        "none", "frequencies for long contexts (HF rope_type)", choices=("none", "linear", "llama3", "yarn")
    )
    rope_factor: float = key(1.0, "factor by which the context grows (HF factor)", Range(1, 10**6, 8))
    rope_original_max_positions: int | None = key(
        None, "context before scaling, for llama3 and yarn (HF original_max_position_embeddings)", POSITIONS
    )
    rope_low_freq_factor: float = key(
        1.0, "llama3: turns below which a frequency is scaled (HF low_freq_factor)", TURNS
    )
    rope_high_freq_factor: float = key(
        4.0, "llama3: turns above which a frequency is kept (HF high_freq_factor)", TURNS
    )
    rope_beta_fast: float = key(32.0, "yarn: turns above which a frequency is kept (HF beta_fast)", TURNS)
    rope_beta_slow: float = key(1.0, "yarn: turns below which a frequency is scaled (HF beta_slow)", TURNS)
    rope_mscale: float = key(0.0, "yarn: weight of the attention factor (HF mscale)", Range(0, 100, 1))
    rope_mscale_all_dim: float = key(
        0.0, "yarn: divisor of the attention factor; 0: as in the paper (HF mscale_all_dim)", Range(0, 100, 1)
    )
    dropout: float = key(0.0, "dropout of embeddings and residual branches (HF embd_pdrop, resid_pdrop)", SHARE)
    attention_dropout: float = key(0.0, "dropout of attention probabilities (HF attention_dropout, attn_pdrop)", SHARE)
    sliding_window: int | None = key(None, "positions that a query attends to, its own included; null: all", POSITIONS)
    from_hf: str | None = key(None, "start from this Hugging Face folder; its config.json defines the model", path="in")
    add_tokens: tuple[str, ...] = key((), "control tokens to add to data.tokenizer, e.g. [<|im_start|>, <|im_end|>]")

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies by a gate."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")


@dataclass(frozen=True)
class ResolvedModel(Complete, ModelConfig):
    num_kv_heads: int = field(kw_only=True, metadata=rule_of(ModelConfig, "num_kv_heads"))
    head_dim: int = field(kw_only=True, metadata=rule_of(ModelConfig, "head_dim"))
    family: str = field(kw_only=True, metadata=rule_of(ModelConfig, "family"))

    @property
    def learned_positions(self) -> int:
        """Rows of the learned position embedding; 0 for a model with RoPE."""
        return (self.max_positions or 0) if self.position == "learned" else 0


def resolve_model(model: ModelConfig, seq_len: int) -> ResolvedModel:
    """Fill in the keys of a model that follow from others. Raises ConfigError if the heads do not divide the width.

    `seq_len`: rows of a learned position embedding if model.max_positions is null.
    """
    if model.head_dim is None and (model.num_heads < 1 or model.hidden_size % model.num_heads):
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}; change one "
            f"of them, or set model.head_dim"
        )
    learned = model.position == "learned"
    chosen = {
        "num_kv_heads": model.num_kv_heads if model.num_kv_heads is not None else model.num_heads,
        "head_dim": model.head_dim if model.head_dim is not None else model.hidden_size // model.num_heads,
        "family": model.family or ("gpt2" if learned else "llama"),
        "max_positions": seq_len if learned and model.max_positions is None else model.max_positions,
    }
    return ResolvedModel(**values_of(model) | chosen)
