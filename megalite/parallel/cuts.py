"""Which part of a whole tensor a rank holds, as plain data.

A `Shard` lists the ranges of one dimension that a rank holds: usually one, two for a fused gate_up, and some of them
shared with other ranks where kv heads are replicated. Slicing at init, gradient norm, checkpoint and gathering all read
this one description. The cut is not always even: vocabulary rows are padded to a multiple of tp, and the padding exists
only in the local tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + length) of the whole stand at [offset, offset + length) of the local tensor.

    `owned`: this rank counts the piece in norms and writes it to checkpoints; of several replicas one does.
    """

    start: int
    offset: int
    length: int
    owned: bool = True


@dataclass(frozen=True)
class Shard:
    """The local part of a tensor of `whole_shape`, cut along `dim`; `local_size` counts padding rows too."""

    whole_shape: tuple[int, ...]
    dim: int
    local_size: int
    pieces: tuple[Piece, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.whole_shape)
        shape[self.dim] = self.local_size
        return tuple(shape)

    def cut(self, whole: Tensor) -> Tensor:
        """The local tensor out of the whole one; padding is zero."""
        assert tuple(whole.shape) == self.whole_shape, (tuple(whole.shape), self.whole_shape)
        local = whole.new_zeros(self.local_shape)
        for piece in self.pieces:
            self.local_rows(local, piece).copy_(whole.narrow(self.dim, piece.start, piece.length))
        return local

    def put(self, local: Tensor, whole: Tensor) -> None:
        """Write the local tensor into its place in the whole one."""
        for piece in self.pieces:
            whole.narrow(self.dim, piece.start, piece.length).copy_(self.local_rows(local, piece))

    def local_rows(self, local: Tensor, piece: Piece) -> Tensor:
        """The view of `local` that `piece` describes."""
        return local.narrow(self.dim, piece.offset, piece.length)

    def owned(self, local: Tensor) -> list[tuple[Piece, Tensor]]:
        """The pieces this rank answers for, each with its view of `local`."""
        return [(piece, self.local_rows(local, piece)) for piece in self.pieces if piece.owned]


def uncut(shape: Sequence[int], rank: int) -> Shard:
    """Every rank holds all of it; rank 0 of the group owns it."""
    return Shard(tuple(shape), 0, shape[0], (Piece(0, 0, shape[0], rank == 0),))


def even(shape: Sequence[int], dim: int, size: int, rank: int, parts: int = 1) -> Shard:
    """`size` equal shares of each of `parts` equal blocks along `dim` (parts 2: [gate; up] becomes [gate_i; up_i])."""
    block = shape[dim] // parts
    assert block * parts == shape[dim], (shape, parts)
    assert block % size == 0, (shape, parts, size)
    share = block // size
    pieces = tuple(Piece(part * block + rank * share, part * share, share) for part in range(parts))
    return Shard(tuple(shape), dim, share * parts, pieces)


def padded(shape: Sequence[int], size: int, rank: int) -> Shard:
    """Rows in `size` equal shares, the last ones short: the vocabulary."""
    share = -(-shape[0] // size)
    start = min(rank * share, shape[0])
    length = min(share, shape[0] - start)
    return Shard(tuple(shape), 0, share, (Piece(start, 0, length),) if length else ())


def grouped_qkv(shape: Sequence[int], *, kv_groups: int, queries: int, head_dim: int, size: int, rank: int) -> Shard:
    """Rows of a fused qkv, ordered [`queries` query heads, key, value] x `kv_groups`.

    Where `size` divides the kv groups a rank gets whole groups. Where it is a multiple of them, r = size / kv_groups
    neighbouring ranks share a group: each has queries / r of its query heads and a replica of its key and value.
    """
    group = (queries + 2) * head_dim
    assert shape[0] == kv_groups * group, (shape, kv_groups, group)
    if kv_groups % size == 0:
        return even(shape, 0, size, rank)
    replicas = size // kv_groups
    assert replicas * kv_groups == size, (kv_groups, size)
    assert queries % replicas == 0, (queries, replicas)
    start, replica = rank // replicas * group, rank % replicas
    local_queries = queries // replicas * head_dim
    return Shard(
        tuple(shape),
        0,
        local_queries + 2 * head_dim,
        (
            Piece(start + replica * local_queries, 0, local_queries),
            Piece(start + queries * head_dim, local_queries, 2 * head_dim, owned=replica == 0),
        ),
    )


def sum_of_squares(shard: Shard, local: Tensor) -> Tensor:
    """Σ x² over the owned pieces, in float64 (a scalar tensor)."""
    total = torch.zeros((), dtype=torch.float64, device=local.device)
    for _, rows in shard.owned(local):
        total += torch.linalg.vector_norm(rows, dtype=torch.float64).square()
    return total
