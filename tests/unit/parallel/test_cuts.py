"""Every rank's shard of every parameter: together they are the whole, each element owned once."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megalite.config import Config, ModelConfig, resolve
from megalite.config.check import valid_tp
from megalite.config.parameters import is_partial, row_of
from megalite.model.cut_table import shard_of
from megalite.model.decoder import Decoder
from megalite.parallel.cuts import Piece, Shard, even, grouped_qkv, padded, sum_of_squares, uncut

BASE = ModelConfig(
    vocab_size=101,
    hidden_size=12,
    num_layers=2,
    num_heads=12,
    head_dim=2,
    ffn_hidden_size=24,
    qkv_bias=True,
    qk_norm=True,
)
MODELS = {
    "mha": BASE,
    "gqa6": dataclasses.replace(BASE, num_kv_heads=6),
    "gqa3": dataclasses.replace(BASE, num_kv_heads=3),
    "gqa2": dataclasses.replace(BASE, num_kv_heads=2),
    "mqa": dataclasses.replace(BASE, num_kv_heads=1),
    "small vocabulary": dataclasses.replace(BASE, vocab_size=5),  # fewer rows than some ranks' shares
}
CASES = [
    pytest.param(resolved, tp, id=f"{name}-tp{tp}")
    for name, model in MODELS.items()
    for resolved in [resolve(Config(model=model), 1).model]
    for tp in valid_tp(resolved)
]


def whole_model(model: ModelConfig) -> dict[str, Tensor]:
    """Every parameter, all its elements different and none zero."""
    with torch.device("meta"):
        decoder = Decoder(model, range(model.num_layers))
    return {n: torch.arange(1.0, p.numel() + 1).view(p.shape) for n, p in decoder.named_parameters()}


def marks(shard: Shard, shape: tuple[int, ...], local: bool, owned: bool = False) -> Tensor:
    """How often the pieces (`owned`: those this rank owns) touch each element of the local or the whole tensor."""
    count = torch.zeros(shape)
    for piece in shard.pieces:
        if piece.owned or not owned:
            count.narrow(shard.dim, piece.offset if local else piece.start, piece.length).add_(1)
    return count


@pytest.mark.parametrize(("model", "tp"), CASES)
def test_the_owned_pieces_are_the_whole_exactly_once(model: ModelConfig, tp: int) -> None:
    for name, whole in whole_model(model).items():
        shards = [shard_of(name, whole.shape, model, tp, rank) for rank in range(tp)]
        assert bool((sum(marks(s, whole.shape, local=False, owned=True) for s in shards) == 1).all()), name
        assert len({s.local_shape for s in shards}) == 1  # collectives want equal shapes
        total = sum(sum_of_squares(s, s.cut(whole)).item() for s in shards)
        assert math.isclose(total, whole.double().square().sum().item(), rel_tol=1e-12)


@pytest.mark.parametrize(("model", "tp"), CASES)
def test_round_trip_and_padding(model: ModelConfig, tp: int) -> None:
    for name, whole in whole_model(model).items():
        again = torch.zeros_like(whole)
        for rank in range(tp):
            shard = shard_of(name, whole.shape, model, tp, rank)
            local = shard.cut(whole)
            filled = marks(shard, shard.local_shape, local=True)
            assert local.shape == shard.local_shape
            assert bool((filled <= 1).all())
            assert torch.equal(local != 0, filled == 1)  # what no piece fills is zero, and nothing else is
            shard.put(local, again)
        assert torch.equal(again, whole), name


@pytest.mark.parametrize(("model", "tp"), CASES)
def test_what_is_cut(model: ModelConfig, tp: int) -> None:
    """Memory falls by tp but for padding and for replicated kv heads."""
    assert model.num_kv_heads is not None
    for name, whole in whole_model(model).items():
        shard, cut = shard_of(name, whole.shape, model, tp, tp - 1), row_of(name).cut
        if not cut:
            assert shard.local_shape == whole.shape
        elif cut == "vocab":
            assert shard.local_size == -(-model.vocab_size // tp)
        elif cut == "qkv":
            assert shard.local_size == (12 // tp + 2 * max(1, model.num_kv_heads // tp)) * 2
        else:
            assert shard.local_size * tp == whole.shape[shard.dim]
            assert shard.dim == (1 if cut == "row" else 0)


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


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_not_cut_has_a_partial_gradient(model: ModelConfig) -> None:
    for name in whole_model(resolve(Config(model=model), 1).model):
        if row_of(name).cut:
            assert not is_partial(name, sp=True)
        else:
            assert name.endswith("norm.weight")
            assert is_partial(name, sp=True)
            assert is_partial(name, sp=False) == (".q_norm" in name or ".k_norm" in name)


@pytest.mark.parametrize(("model", "tp"), CASES)
@pytest.mark.parametrize("dp", [1, 2, 3, 7])
def test_blocks_of_all_spans_are_the_whole_exactly_once(model: ModelConfig, tp: int, dp: int) -> None:
    """Ranges of the flattened local tensor that begin and end anywhere: in a row, at its end, within a piece."""
    for name, whole in whole_model(model).items():
        again = torch.zeros_like(whole)
        for rank in range(tp):
            shard = shard_of(name, whole.shape, model, tp, rank)
            local = shard.cut(whole)
            edges = [local.numel() * i // dp for i in range(dp + 1)]
            for span in map(range, edges, edges[1:]):
                part = local.flatten()[span.start : span.stop].clone()
                blocks = shard.blocks(span)
                assert len(blocks) <= 3 * len(shard.pieces)
                for block in blocks:
                    for values in (shard.view(part, block, span.start), shard.view(local, block)):
                        place = tuple(slice(a, a + n) for a, n in zip(block.start, block.size))
                        assert torch.equal(values, whole[place])
                    again[place] += values if block.owned else 0
        assert torch.equal(again, whole), name


def test_a_span_is_at_most_three_rectangles() -> None:
    shard = uncut((5, 4), 0)
    assert [(b.start, b.size) for b in shard.blocks(range(2, 18))] == [
        ((0, 2), (1, 2)),
        ((1, 0), (3, 4)),
        ((4, 0), (1, 2)),
    ]
    assert [(b.start, b.size) for b in shard.blocks(range(5, 7))] == [((1, 1), (1, 2))]
    assert shard.blocks(range(7, 7)) == []
