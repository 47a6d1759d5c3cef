"""LoRA (Hu et al. 2021): y = W x + (alpha / r) · B A x, with W frozen; one (A, B) per projection of Hugging Face's.

The factors are cut as the linear is, by rows of the cut table. Beside a column-parallel linear A is whole on every rank
and B has this rank's rows; the low-rank product A x is what travels, r features a token in place of in. Beside a
row-parallel one A has this rank's columns and B is whole; the summand B A x joins W x before the reduction.
Shapes as in tensor_parallel: x [b, s, in], a [r, in], b [out, r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import Resolved
from megalite.config.parameters import row_of
from megalite.config.shapes import Projection, local_shape, projections
from megalite.config.trained import adapted
from megalite.model.context import Context
from megalite.model.decoder import Decoder
from megalite.model.dropout import Dropout
from megalite.parallel.groups import Group
from megalite.parallel.tensor_parallel import ColumnLinear, RowLinear, column_input


class Factors(nn.Module):
    """A pair: a [rank, columns], b [rows, rank]."""

    def __init__(self, rank: int, rows: int, columns: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, columns))
        self.b = nn.Parameter(torch.empty(rows, rank))


def join(parts: Mapping[str, Tensor], rows: Mapping[str, int], head_dim: int) -> Tensor:
    """Outputs of the projections, `parts` {name: [..., rows[name]]}, in the row order of the fused linear.

    rows: output features of every projection of the linear, in order; one that is not in `parts` contributes zeros.
    Query, key and value alternate by kv group, gate and up do not.
    """
    some = next(iter(parts.values()))
    whole = [parts[n] if n in parts else some.new_zeros((*some.shape[:-1], rows[n])) for n in rows]
    if list(rows) != ["q", "k", "v"]:
        return whole[0] if len(whole) == 1 else torch.cat(whole, -1)
    groups = rows["k"] // head_dim
    return torch.cat([part.unflatten(-1, (groups, -1, head_dim)) for part in whole], -2).flatten(-3)


class LoraColumn(ColumnLinear):
    """A frozen column-parallel linear and its factors; rows: this rank's output features of each projection."""

    def __init__(
        self,
        linear: nn.Linear,
        group: Group,
        sp: bool,
        chosen: Sequence[Projection],
        *,
        rank: int,
        scale: float,
        dropout: Dropout,
        rows: Mapping[str, int],
        head_dim: int,
    ) -> None:
        super().__init__(linear, group, sp)
        self.scale, self.dropout, self.rows, self.head_dim = scale, dropout, rows, head_dim
        self.pairs = {p.name: Factors(rank, p.rows, p.columns) for p in chosen}
        for name, pair in self.pairs.items():
            self.add_module(f"lora_{name}", pair)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        pairs = self.pairs.values()
        # under sp x is this rank's part of the sequence
        low = F.linear(self.dropout(x, context), torch.cat([pair.a for pair in pairs]))
        low = column_input(low * self.scale, self.group, self.sp)
        parts = {n: F.linear(part, pair.b) for n, pair, part in zip(self.pairs, pairs, low.chunk(len(pairs), -1))}
        return super().forward(x, context) + join(parts, self.rows, self.head_dim)


class LoraRow(RowLinear):
    """A frozen row-parallel linear and its factors."""

    def __init__(
        self, linear: nn.Linear, group: Group, sp: bool, of: Projection, *, rank: int, scale: float, dropout: Dropout
    ) -> None:
        super().__init__(linear, group, sp)
        self.scale, self.dropout = scale, dropout
        self.pairs = {of.name: Factors(rank, of.rows, of.columns)}
        self.add_module(f"lora_{of.name}", self.pairs[of.name])

    def product(self, x: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        (pair,) = self.pairs.values()
        # dropout numbers its second dimension from the whole tensor's start, and here it is the features that are cut
        dropped = self.dropout(x.transpose(1, 2), context).transpose(1, 2)
        return super().product(x, context) + F.linear(F.linear(dropped, pair.a) * self.scale, pair.b)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        return self.reduced(self.product(x, context))


def adapt(decoder: Decoder, config: Resolved, group: Group) -> None:
    """Replace the linears that tune.lora_targets names by linears with factors, in place.

    Call it on the cut model while its weights are on meta and whole.
    """
    m, t, sp = config.model, config.tune, config.parallel.sp
    # dropout sites are numbered after the model's own
    first_site = 3 * m.num_layers + 1
    linears = projections(m)
    for name, chosen in adapted(m, config.tune).items():
        _, layer, kind = name.split(".", 2)
        if layer not in decoder.layers:
            continue
        parent_name, _, child = name.rpartition(".")
        parent = decoder.get_submodule(parent_name)
        linear: Any = decoder.get_submodule(name)
        dropout = Dropout(t.lora_dropout, site=first_site + len(linears) * int(layer) + list(linears).index(kind))
        scale = t.lora_alpha / t.lora_rank
        adapter: LoraRow | LoraColumn
        if row_of(f"{name}.weight").cut == "row":
            dropout.shard = group.rank
            adapter = LoraRow(linear, group, sp, chosen[0], rank=t.lora_rank, scale=scale, dropout=dropout)
        else:
            dropout.shard = group.rank if sp else 0
            factors = {p.name: row_of(f"{name}.lora_{p.name}.b") for p in linears[kind]}
            rows = {n: local_shape(row, m, group.size, rank=t.lora_rank)[0] for n, row in factors.items()}
            adapter = LoraColumn(
                linear,
                group,
                sp,
                chosen,
                rank=t.lora_rank,
                scale=scale,
                dropout=dropout,
                rows=rows,
                head_dim=m.head_dim,
            )
        setattr(parent, child, adapter)
