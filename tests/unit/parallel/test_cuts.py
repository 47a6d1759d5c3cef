"""The cuts of one tensor: which elements each rank holds, which it owns, and what is padded."""

import pytest
import torch

from megalite.parallel.cuts import Piece, Shard, even, grouped_qkv, padded, sum_of_squares, uncut


def test_replicated_kv_heads() -> None:
    """Two kv groups [q0 q1 k v] on four ranks: separate queries, key and value on two ranks, owned by the first."""
    held = [[0, 2, 3], [1, 2, 3], [4, 6, 7], [5, 6, 7]]
    for rank, rows in enumerate(held):
        shard = grouped_qkv((8,), kv_groups=2, queries=2, head_dim=1, size=4, rank=rank)
        assert shard.cut(torch.arange(8)).tolist() == rows
        assert [piece.owned for piece in shard.pieces] == [True, rank % 2 == 0]
    # where tp divides the groups a rank has whole groups
    shard = grouped_qkv((8,), kv_groups=2, queries=2, head_dim=1, size=2, rank=1)
    assert shard.cut(torch.arange(8)).tolist() == [4, 5, 6, 7]


def test_parts_are_cut_equally() -> None:
    assert [even((8,), 0, 2, rank, parts=2).cut(torch.arange(8)).tolist() for rank in (0, 1)] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]


def test_the_vocabulary_is_padded_at_its_end() -> None:
    assert [padded((5,), 3, rank).cut(torch.arange(1, 6)).tolist() for rank in range(3)] == [[1, 2], [3, 4], [5, 0]]
    assert padded((5,), 4, 3) == Shard((5,), 0, 2, ())
    assert padded((6,), 3, 2).pieces == (Piece(4, 0, 2),)


def test_uncut_belongs_to_rank_0() -> None:
    assert [[b.owned for b in uncut((3, 2), rank).blocks()] for rank in range(3)] == [[True], [False], [False]]


def test_sum_of_squares_is_taken_in_float64() -> None:
    ones = torch.full((10_000,), 0.1)
    assert abs(sum_of_squares(uncut(ones.shape, 0), ones).item() / (10_000 * ones[0].item() ** 2) - 1) < 1e-12


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(AssertionError):
        even((7, 2), 0, 2, 0)
    with pytest.raises(AssertionError):
        grouped_qkv((12,), kv_groups=3, queries=2, head_dim=1, size=2, rank=0)
    with pytest.raises(AssertionError):
        uncut((3,), 0).cut(torch.zeros(4))


def test_a_span_is_at_most_three_rectangles() -> None:
    shard = uncut((5, 4), 0)
    assert [(b.start, b.size) for b in shard.blocks(range(2, 18))] == [
        ((0, 2), (1, 2)),
        ((1, 0), (3, 4)),
        ((4, 0), (1, 2)),
    ]
    assert [(b.start, b.size) for b in shard.blocks(range(5, 7))] == [((1, 1), (1, 2))]
    assert shard.blocks(range(7, 7)) == []
