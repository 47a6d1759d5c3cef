"""Tensor parallelism as a table: one row per kind of module says how its weights are cut and what it becomes.

The same table answers for init, gradient norm, checkpoint, conversion and gathering: `shard_of` is a function of a
parameter's global name. For parameters that are not cut it says how their gradient is partial over tp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from megalite.config import ModelConfig
from megalite.model.attention import Attention
from megalite.model.decoder import CrossEntropy, Decoder
from megalite.model.dropout import Dropout
from megalite.parallel.cuts import Shard, even, grouped, grouped_qkv, padded, uncut
from megalite.parallel.groups import Group
from megalite.parallel.tensor_parallel import ColumnLinear, RowLinear
from megalite.parallel.vocab import SequenceEmbedding, VocabCrossEntropy, VocabEmbedding


@dataclass(frozen=True)
class Cut:
    """`module`: pattern of the module's name; `parts`: equal blocks.

    `kind`: vocab, qkv, kv (its keys or values alone), column, row, heads, sequence.

    `heads` and `sequence` cut no weight: the module sees this rank's heads, or under sequence parallelism its part of
    the sequence.
    """

    module: str
    kind: str
    parts: int = 1


# factors of LoRA: of a linear cut by rows `b` is, of one cut by columns `a`
LORA_TABLE = (
    Cut(r"layers\.\d+\.attn\.qkv\.lora_qkv\.b", "qkv"),
    Cut(r"layers\.\d+\.attn\.qkv\.lora_[kv]\.b", "kv"),
    Cut(r"layers\.\d+\.(attn\.qkv|mlp\.gate_up|mlp\.up)\.lora_(q|gate|up)\.b", "column"),
    Cut(r"layers\.\d+\.(attn\.out|mlp\.down)\.lora_(o|down)\.a", "row"),
)

CUT_TABLE = (
    Cut(r"embed", "vocab"),
    Cut(r"pos_embed", "sequence"),
    Cut(r"layers\.\d+\.attn\.qkv", "qkv"),
    Cut(r"layers\.\d+\.attn\.out", "row"),
    Cut(r"layers\.\d+\.mlp\.gate_up", "column", parts=2),
    Cut(r"layers\.\d+\.mlp\.up", "column"),
    Cut(r"layers\.\d+\.mlp\.down", "row"),
    Cut(r"loss_head\.head", "vocab"),
    Cut(r"dropout|layers\.\d+\.(attn|mlp)_dropout", "sequence"),
    Cut(r"layers\.\d+\.attn\.core\.dropout", "heads"),
    *LORA_TABLE,
)

ADAPTER = re.compile(r"(layers\.\d+\.(attn|mlp)\.\w+)\.lora_(\w+)\.([ab])")

# Uncut parameters whose gradient each tp rank sees only in part: always, or only under sequence parallelism.
PARTIAL_ALWAYS = re.compile(r".*\.(q_norm|k_norm)\.weight|.*\.(out|down)\.lora_\w+\.b")
PARTIAL_UNDER_SP = re.compile(
    r"pos_embed\.weight|.*\b(attn_norm|mlp_norm|norm)\.(weight|bias)|.*\.(out|down)\.bias"
    r"|.*\.(qkv|gate_up|up)\.lora_\w+\.a"
)


def global_name(name: str, tied: bool) -> str:
    """The name under which a parameter is initialised, counted and stored: tied weights have one."""
    return "embed.weight" if tied and name == "loss_head.head.weight" else name


def find_cut(name: str) -> Cut | None:
    """The row of the table for a module or parameter name; None where nothing is cut."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    return next((cut for cut in CUT_TABLE if re.fullmatch(cut.module, module)), None)


def shard_of(name: str, shape: Sequence[int], model: ModelConfig, size: int, rank: int) -> Shard:
    """What tp rank `rank` of `size` holds of the parameter `name`, whole `shape`."""
    cut = find_cut(name)
    if cut is None or cut.kind == "sequence" or (cut.kind == "row" and name.endswith(".bias")):
        return uncut(shape, rank)
    if cut.kind == "vocab":
        return padded(shape, size, rank)
    if cut.kind == "kv":
        assert model.num_kv_heads is not None
        return grouped(shape, groups=model.num_kv_heads, size=size, rank=rank)
    if cut.kind == "qkv":
        assert model.num_kv_heads is not None
        assert model.head_dim is not None
        queries = model.num_heads // model.num_kv_heads
        return grouped_qkv(
            shape, kv_groups=model.num_kv_heads, queries=queries, head_dim=model.head_dim, size=size, rank=rank
        )
    return even(shape, 1 if cut.kind == "row" else 0, size, rank, cut.parts)


def is_partial(name: str, sp: bool) -> bool:
    """Whether the gradient of an uncut parameter must be summed over tp."""
    return bool(PARTIAL_ALWAYS.fullmatch(name) or (sp and PARTIAL_UNDER_SP.fullmatch(name)))


def cut_model(decoder: Decoder, model: ModelConfig, group: Group, sp: bool) -> None:
    """Replace the modules named by the table by their parallel counterparts, in place.

    In a group of one only linears are replaced, by linears whose weight gradient can be deferred. Weights stay whole
    (they are on meta).
    """
    vocab = padded((model.vocab_size, model.hidden_size), group.size, group.rank)
    for name, module in list(decoder.named_modules()):
        parent_name, _, child = name.rpartition(".")
        parent = decoder.get_submodule(parent_name)
        cut = find_cut(name)
        if cut is not None and isinstance(module, nn.Linear):
            kind = RowLinear if cut.kind == "row" else ColumnLinear
            setattr(parent, child, kind(module, group, sp))
        elif group.size == 1:
            continue
        elif isinstance(module, Attention):
            assert model.num_kv_heads is not None
            module.queries //= max(1, group.size // model.num_kv_heads)
        elif isinstance(module, CrossEntropy):
            setattr(parent, child, VocabCrossEntropy(group, vocab, module.label_smoothing))
        elif isinstance(module, Dropout):
            assert cut is not None, name
            module.shard = group.rank if sp or cut.kind == "heads" else 0
        elif cut is not None and cut.kind == "sequence":
            if sp:
                setattr(parent, child, SequenceEmbedding(module, group))
        elif cut is not None and isinstance(module, nn.Embedding):
            setattr(parent, child, VocabEmbedding(module, group, sp, vocab))
