"""Which part of a whole tensor a rank holds, as plain data.

A `Shard` lists the ranges of one dimension that a rank holds: usually one, two for a fused gate_up, and ranges shared
with other ranks where kv heads are replicated. Slicing at init, the gradient norm, checkpoints and gathering all read
this one description. Cuts may be uneven: vocabulary rows are padded to a multiple of tp, and the padding exists only in
the local tensor.

Under ZeRO, data-parallel ranks divide the flattened elements of a local tensor into ranges. Such a range is at most
three rectangles of the whole tensor, `Block`s, over which norms are computed and which checkpoints store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + length) of the whole tensor, at [offset, offset + length) in the local tensor.

    `owned`: this rank counts the piece in norms and writes it to checkpoints; one of several replicas does.
    """

    start: int
    offset: int
    length: int
    owned: bool = True


@dataclass(frozen=True)
class Block:
    """A rectangle: per dim `size` elements, at `start` in the whole tensor and at `offset` in the local one."""

    start: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    owned: bool = True


@dataclass(frozen=True)
class Shard:
    """The local part of a tensor of `whole_shape`, cut along `dim` into `local_size` rows, padding included."""

    whole_shape: tuple[int, ...]
    dim: int
    local_size: int
    pieces: tuple[Piece, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        shape = list(self.whole_shape)
        shape[self.dim] = self.local_size
        return tuple(shape)

    @property
    def numel(self) -> int:
        """Number of elements of the local tensor, padding included."""
        return math.prod(self.local_shape)

    def blocks(self, span: range | None = None) -> list[Block]:
        """The elements `span` of the flattened local tensor (None: all), without padding, as rectangles."""
        found, dim = [], self.dim
        for offset, size in _rectangles(self.local_shape, span if span is not None else range(self.numel)):
            for piece in self.pieces:
                low = max(offset[dim], piece.offset)
                length = min(offset[dim] + size[dim], piece.offset + piece.length) - low
                if length > 0:
                    start, offsets, sizes = list(offset), list(offset), list(size)
                    start[dim], offsets[dim], sizes[dim] = piece.start + low - piece.offset, low, length
                    found.append(Block(tuple(start), tuple(offsets), tuple(sizes), piece.owned))
        return found

    def held(self, x: Tensor, span: range) -> range:
        """The range of the flattened local tensor that `x` holds: all of it, or `span` if `x` is only that part."""
        assert x.numel() in (self.numel, len(span)), (x.shape, self, span)
        return range(self.numel) if x.numel() == self.numel else span

    def view(self, flat: Tensor, block: Block, first: int = 0) -> Tensor:
        """View `block` in `flat`, which is the flattened local tensor from element `first` on."""
        strides = (math.prod(self.local_shape[1:]), 1)[: len(block.size)]
        begin = sum(o * s for o, s in zip(block.offset, strides)) - first
        return flat.as_strided(block.size, strides, flat.storage_offset() + begin)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the local tensor cut out of the whole one; padding is zero."""
        assert tuple(whole.shape) == self.whole_shape, (tuple(whole.shape), self.whole_shape)
        local = whole.new_zeros(self.local_shape)
        for piece in self.pieces:
            self.local_rows(local, piece).copy_(whole.narrow(self.dim, piece.start, piece.length))
        return local

    def put(self, local: Tensor, whole: Tensor) -> None:
        """Write the local tensor to its place in the whole one."""
        for piece in self.pieces:
            whole.narrow(self.dim, piece.start, piece.length).copy_(self.local_rows(local, piece))

    def local_rows(self, local: Tensor, piece: Piece) -> Tensor:
        """View `piece` in the local tensor."""
        return local.narrow(self.dim, piece.offset, piece.length)


def uncut(shape: Sequence[int], rank: int) -> Shard:
    """A tensor that every rank holds whole; rank 0 of the group owns it."""
    return Shard(tuple(shape), 0, shape[0], (Piece(0, 0, shape[0], rank == 0),))


def even(shape: Sequence[int], dim: int, size: int, rank: int, parts: int = 1) -> Shard:
    """Cut each of `parts` equal blocks along `dim` into `size` equal shares (parts 2: [gate; up] → [gate_i; up_i])."""
    block = shape[dim] // parts
    assert block * parts == shape[dim], (shape, parts)
    assert block % size == 0, (shape, parts, size)
    share = block // size
    pieces = tuple(Piece(part * block + rank * share, part * share, share) for part in range(parts))
    return Shard(tuple(shape), dim, share * parts, pieces)


def padded(shape: Sequence[int], size: int, rank: int) -> Shard:
    """Cut rows into `size` shares, padded to equal length at the end: the vocabulary."""
    share = -(-shape[0] // size)
    start = min(rank * share, shape[0])
    length = min(share, shape[0] - start)
    return Shard(tuple(shape), 0, share, (Piece(start, 0, length),) if length else ())


def grouped_qkv(shape: Sequence[int], *, kv_groups: int, queries: int, head_dim: int, size: int, rank: int) -> Shard:
    """Cut the rows of a fused qkv, ordered [`queries` query heads, key, value] x `kv_groups`.

    If `size` divides kv_groups, each rank gets whole groups. If it is a multiple, r = size / kv_groups neighbouring
    ranks share a group: each has queries / r of its query heads and a replica of its key and value.
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


def grouped(shape: Sequence[int], *, groups: int, size: int, rank: int) -> Shard:
    """Cut rows by equal groups; if `size` is r times `groups`, r neighbouring ranks hold the same group."""
    if groups % size == 0:
        return even(shape, 0, size, rank)
    replicas, rows = size // groups, shape[0] // groups
    assert replicas * groups == size, (groups, size)
    assert rows * groups == shape[0], (shape, groups)
    return Shard(tuple(shape), 0, rows, (Piece(rank // replicas * rows, 0, rows, owned=rank % replicas == 0),))


def _rectangles(shape: tuple[int, ...], span: range) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (offset, size) of the rectangles that make up `span` of a flattened tensor with one or two dims."""
    if len(shape) == 1:
        if span:
            yield (span.start,), (len(span),)
        return
    position, (_, columns) = span.start, shape
    while position < span.stop:
        row, column = divmod(position, columns)
        rows = (span.stop - position) // columns if column == 0 else 0
        size = (rows, columns) if rows else (1, min(columns - column, span.stop - position))
        yield (row, column), size
        position += size[0] * size[1]


def split(block: Block, most: int) -> Iterator[Block]:
    """Split `block` into blocks of at most `most` elements: by rows, and by columns if one row is larger."""

    def along(part: Block, dim: int) -> Iterator[Block]:
        below = math.prod(part.size[dim + 1 :])
        step = max(1, most // below)
        for at in range(0, part.size[dim], step):
            start, offset, size = list(part.start), list(part.offset), list(part.size)
            start[dim], offset[dim], size[dim] = start[dim] + at, offset[dim] + at, min(step, size[dim] - at)
            small = Block(tuple(start), tuple(offset), tuple(size), part.owned)
            if below > most:
                yield from along(small, dim + 1)
            else:
                yield small

    assert most > 0
    return along(block, 0)


def sum_of_squares(shard: Shard, local: Tensor, span: range | None = None) -> Tensor:
    """Σ x² over the owned part of `span` of the flattened local tensor, a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=local.device)
    for block in shard.blocks(span):
        if block.owned:
            total += torch.linalg.vector_norm(shard.view(local, block), dtype=torch.float64).square()
    return total
