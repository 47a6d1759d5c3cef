"""Tensor parallelism of a model: what each rank holds of a parameter, and which modules replace the plain ones.

Both follow from the column `cut` of the table in megalite/config/parameters.py. `shard_of` is a function of a
parameter's global name, so init, gradient norm, checkpoint, conversion and gathering agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megalite.config import ResolvedModel
from megalite.config.parameters import row_of
from megalite.model.attention import Attention, AttentionCore
from megalite.model.decoder import CrossEntropy, Decoder
from megalite.model.dropout import Dropout
from megalite.parallel.cuts import Shard, even, grouped, grouped_qkv, padded, uncut
from megalite.parallel.groups import Group
from megalite.parallel.tensor_parallel import ColumnLinear, RowLinear
from megalite.parallel.vocab import SequenceEmbedding, VocabCrossEntropy, VocabEmbedding


def shard_of(name: str, shape: Sequence[int], model: ResolvedModel, size: int, rank: int) -> Shard:
    """What tp rank `rank` of `size` holds of the parameter `name`, whole `shape`. KeyError if the table lacks it."""
    row = row_of(name)
    if row.cut == "":
        return uncut(shape, rank)
    if row.cut == "vocab":
        return padded(shape, size, rank)
    if row.cut == "kv":
        return grouped(shape, groups=model.num_kv_heads, size=size, rank=rank)
    if row.cut == "qkv":
        queries = model.num_heads // model.num_kv_heads
        return grouped_qkv(
            shape, kv_groups=model.num_kv_heads, queries=queries, head_dim=model.head_dim, size=size, rank=rank
        )
    if row.cut == "row":
        return even(shape, 1, size, rank)
    # of gate and up each is cut alike
    return even(shape, 0, size, rank, parts=len(row.shape[0].split()))


def cut_model(decoder: Decoder, model: ResolvedModel, group: Group, sp: bool) -> None:
    """Replace modules by their parallel counterparts, in place.

    In a group of one only linears are replaced, by linears whose weight gradient can be deferred. Weights stay whole
    (they are on meta).
    """
    vocab = padded((model.vocab_size, model.hidden_size), group.size, group.rank)
    for name, module in list(decoder.named_modules()):
        parent_name, _, child = name.rpartition(".")
        parent = decoder.get_submodule(parent_name)
        if isinstance(module, nn.Linear):
            if cut := row_of(f"{name}.weight").cut:
                kind = RowLinear if cut == "row" else ColumnLinear
                setattr(parent, child, kind(module, group, sp))
        elif group.size == 1:
            continue
        elif isinstance(module, Attention):
            module.queries //= max(1, group.size // model.num_kv_heads)
        elif isinstance(module, CrossEntropy):
            setattr(parent, child, VocabCrossEntropy(group, vocab, module.label_smoothing))
        elif isinstance(module, Dropout):
            # the core sees this rank's heads, every other dropout under sequence parallelism its part of the sequence
            module.shard = group.rank if sp or isinstance(parent, AttentionCore) else 0
        elif isinstance(module, nn.Embedding):
            if row_of(f"{name}.weight").cut == "vocab":
                setattr(parent, child, VocabEmbedding(module, group, sp, vocab))
            elif sp:
                setattr(parent, child, SequenceEmbedding(module, group))
