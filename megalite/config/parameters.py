"""The table of parameters: one row a weight, everything that is known of it. No torch here.

Read from top to bottom it is the model, in the order of a forward. Counts, FLOPs, stages, tensor-parallel cuts, initial
values, weight decay, Muon, LoRA's factors and the names in other formats are all read from it, and
tests/unit/config/test_parameters.py holds it against the modules of `Decoder`. A new weight needs its module and a row.

Shapes are written in sizes: vocab, positions, hidden, ffn, head (features of one head), heads (of all query heads),
kv (of all key heads, or of all value heads). Several words in one dimension, as "ffn ffn", are matrices of Hugging
Face's that are one matrix here; their sizes add up.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megalite.config.schema import ModelConfig

Shape = tuple[int, ...]
Where = Literal["first", "layer", "last"]


@dataclass(frozen=True)
class Row:
    """A parameter. In a block its name lacks the `layers.N.`

    `where`: on the first stage, in every layer, or on the last stage.
    `kind`: an embedding is looked up; a matrix is multiplied, so it costs FLOPs and Muon may update it; a scale and a
    bias are vectors; a factor is LoRA's.
    `cut` over tp: vocab, column and kv by rows, kv with replicas where tp exceeds the kv heads; qkv by rows too, which
    are [queries, key, value] for each kv head; row by columns. Empty: every rank holds all of it.
    `partial`: when each tp rank computes only a part of the gradient of an uncut parameter: always, or under sequence
    parallelism ("sp"), where it computes that of its part of the sequence.
    `init`: ones, zeros, normal (init_std), residual (normal, scaled down by depth), uniform (±1 / sqrt(columns)).
    `hf`: by family, the modules whose tensors it joins, without the prefix of the layer. `megatron`: its module in
    Megatron-LM's legacy models.
    `projections`: of a linear that LoRA adapts, a name for each word of its rows. `targets`: by family, what
    tune.lora_targets calls them where the family's files have no such linear.
    `tied`: the parameter that it is if model.tie_embeddings is set. `when`: whether a model has it.
    """

    name: str
    where: Where
    shape: tuple[str, ...]
    kind: Literal["embedding", "matrix", "scale", "bias", "factor"]
    cut: Literal["", "vocab", "qkv", "kv", "column", "row"] = ""
    partial: Literal["", "sp", "always"] = ""
    init: Literal["ones", "zeros", "normal", "residual", "uniform"] = "normal"
    hf: Mapping[str, str] = dataclasses.field(default_factory=dict)
    megatron: str = ""
    projections: tuple[str, ...] = ()
    targets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied: str = ""
    when: Callable[[ModelConfig], bool] = lambda m: True

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def _norm(name: str, where: Where, hf: Mapping[str, str], megatron: str) -> tuple[Row, Row]:
    """The norm of the residual stream: a weight, and with LayerNorm a bias."""
    weight = Row(f"{name}.weight", where, ("hidden",), "scale", partial="sp", init="ones", hf=hf, megatron=megatron)
    bias = dataclasses.replace(
        weight, name=f"{name}.bias", kind="bias", init="zeros", when=lambda m: m.norm == "layernorm"
    )
    return weight, bias


def _linear(weight: Row, biased: Callable[[ModelConfig], bool] = lambda m: m.linear_bias) -> tuple[Row, Row]:
    """A linear's weight and bias. The bias is cut with the weight's rows; beside a row-parallel one it is whole."""
    by_row = weight.cut == "row"
    bias = dataclasses.replace(
        weight,
        name=f"{weight.module}.bias",
        shape=weight.shape[:1],
        kind="bias",
        cut="" if by_row else weight.cut,
        partial="sp" if by_row else "",
        init="zeros",
        projections=(),
        when=lambda m: weight.when(m) and biased(m),
    )
    return weight, bias


# fmt: off
TABLE: tuple[Row, ...] = (
    Row("embed.weight", "first", ("vocab", "hidden"), "embedding", cut="vocab",
        hf={"llama": "model.embed_tokens", "gpt2": "transformer.wte"}, megatron="embedding.word_embeddings"),
    Row("pos_embed.weight", "first", ("positions", "hidden"), "embedding", partial="sp",
        hf={"gpt2": "transformer.wpe"}, megatron="embedding.position_embeddings",
        when=lambda m: m.position == "learned"),

    *_norm("attn_norm", "layer", {"llama": "input_layernorm", "gpt2": "ln_1"}, "input_norm"),
    *_linear(
        Row("attn.qkv.weight", "layer", ("heads kv kv", "hidden"), "matrix", cut="qkv", projections=("q", "k", "v"),
            hf={"llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "gpt2": "attn.c_attn"},
            megatron="self_attention.query_key_value"),
        biased=lambda m: m.qkv_bias or m.linear_bias),
    Row("attn.q_norm.weight", "layer", ("head",), "scale", partial="always", init="ones",
        hf={"llama": "self_attn.q_norm"}, when=lambda m: m.qk_norm),
    Row("attn.k_norm.weight", "layer", ("head",), "scale", partial="always", init="ones",
        hf={"llama": "self_attn.k_norm"}, when=lambda m: m.qk_norm),
    *_linear(
        Row("attn.out.weight", "layer", ("hidden", "heads"), "matrix", cut="row", init="residual", projections=("o",),
            hf={"llama": "self_attn.o_proj", "gpt2": "attn.c_proj"}, megatron="self_attention.dense")),

    *_norm("mlp_norm", "layer", {"llama": "post_attention_layernorm", "gpt2": "ln_2"}, "post_attention_norm"),
    *_linear(
        Row("mlp.gate_up.weight", "layer", ("ffn ffn", "hidden"), "matrix", cut="column", projections=("gate", "up"),
            hf={"llama": "mlp.gate_proj mlp.up_proj"}, targets={"gpt2": "gate_proj c_fc"},
            megatron="mlp.dense_h_to_4h", when=lambda m: m.gated)),
    *_linear(
        Row("mlp.up.weight", "layer", ("ffn", "hidden"), "matrix", cut="column", projections=("up",),
            hf={"llama": "mlp.up_proj", "gpt2": "mlp.c_fc"},
            megatron="mlp.dense_h_to_4h", when=lambda m: not m.gated)),
    *_linear(
        Row("mlp.down.weight", "layer", ("hidden", "ffn"), "matrix", cut="row", init="residual", projections=("down",),
            hf={"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}, megatron="mlp.dense_4h_to_h")),

    *_norm("loss_head.norm", "last", {"llama": "model.norm", "gpt2": "transformer.ln_f"}, "encoder.final_norm"),
    Row("loss_head.head.weight", "last", ("vocab", "hidden"), "matrix", cut="vocab", tied="embed.weight",
        hf={"llama": "lm_head", "gpt2": "lm_head"}, megatron="output_layer"),
)
# fmt: on


def _factors(linear: Row) -> Iterator[Row]:
    """LoRA's factors beside a linear: a [rank, in] and b [out, rank] of each projection, or of those a family joins.

    They are cut as the linear is. Beside a column-parallel one b is cut as the projection's rows are, and a is whole;
    under sequence parallelism a sees a part of the sequence. Beside a row-parallel one a is cut as the columns are, and
    b is whole; each rank multiplies it by a part of the features.
    """
    inside = dict(zip(linear.projections, linear.shape[0].split(), strict=True))
    if any(len(modules.split()) < len(inside) for modules in linear.hf.values()):
        inside["".join(inside)] = linear.shape[0]
    for name, rows in inside.items():
        by_row = linear.cut == "row"
        own = linear.cut if rows == linear.shape[0] else "kv" if rows == "kv" else "column"
        place = f"{linear.module}.lora_{name}"
        yield Row(
            f"{place}.a",
            linear.where,
            ("rank", linear.shape[1]),
            "factor",
            cut="row" if by_row else "",
            partial="" if by_row else "sp",
            init="uniform",
        )
        yield Row(
            f"{place}.b",
            linear.where,
            (rows, "rank"),
            "factor",
            cut="" if by_row else own,
            partial="always" if by_row else "",
            init="zeros",
        )


_PREFIX = re.compile(r"layers\.(\d+)\.")
_BY_NAME = {
    (row.where == "layer", row.name): row
    for row in (*TABLE, *(factor for row in TABLE for factor in (_factors(row) if row.projections else ())))
}


def split_layer(name: str) -> tuple[int | None, str]:
    """layers.3.attn.qkv.weight as (3, attn.qkv.weight); (None, name) for what belongs to no block."""
    layer = _PREFIX.match(name)
    return (int(layer[1]), name[layer.end() :]) if layer else (None, name)


def find_row(name: str) -> Row | None:
    """The row of a parameter, e.g. layers.3.attn.qkv.weight or layers.3.attn.qkv.lora_q.a; None if there is none."""
    layer, rest = split_layer(name)
    return _BY_NAME.get((layer is not None, rest))


def row_of(name: str) -> Row:
    """The row of a parameter; KeyError if the table lacks it."""
    row = find_row(name)
    if row is None:
        raise KeyError(f"{name} has no row in the table of parameters; add one to {__name__}.TABLE")
    return row


def global_name(name: str, tied: bool) -> str:
    """The name under which a parameter is initialised, counted and stored: tied weights have one."""
    return row_of(name).tied or name if tied else name


def is_factor(name: str) -> bool:
    """Whether a parameter is one of LoRA's factors."""
    return row_of(name).kind == "factor"


def is_hidden_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of a block, which Muon updates: no embedding, head or factor is."""
    row = row_of(name)
    return row.kind == "matrix" and row.where == "layer"


def is_decayed(name: str) -> bool:
    """Whether optim.weight_decay applies: to embeddings, matrices and factors, not to scales and biases."""
    return row_of(name).kind in ("embedding", "matrix", "factor")


def is_partial(name: str, sp: bool) -> bool:
    """Whether the gradient of an uncut parameter must be summed over tp."""
    partial = row_of(name).partial
    return partial == "always" or (sp and partial == "sp")


def has_kv_rows(name: str) -> bool:
    """Whether some rows are of key or value heads, of which ranks hold replicas where tp exceeds their number."""
    return row_of(name).cut in ("qkv", "kv")
