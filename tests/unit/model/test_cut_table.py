"""What each rank holds of every parameter: together the whole, each element owned once. Which modules are replaced."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from megalite.config import Config, ModelConfig, resolve
from megalite.config.check import valid_tp
from megalite.config.parameters import is_partial, row_of
from megalite.model.cut_table import cut_model, shard_of
from megalite.model.decoder import Decoder
from megalite.model.dropout import Dropout
from megalite.parallel.cuts import Shard, sum_of_squares
from megalite.parallel.groups import Group
from megalite.parallel.tensor_parallel import ColumnLinear, RowLinear
from megalite.parallel.vocab import VocabCrossEntropy, VocabEmbedding

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


@pytest.mark.parametrize("sp", [False, True])
def test_a_group_of_one_replaces_linears_alone(sp: bool) -> None:
    model = resolve(Config(model=BASE), 1).model
    with torch.device("meta"):
        decoder = Decoder(model, range(model.num_layers))
    before = {name: type(module) for name, module in decoder.named_modules()}
    cut_model(decoder, model, Group([0], 0), sp)
    linears = {"attn.qkv": ColumnLinear, "attn.out": RowLinear, "mlp.gate_up": ColumnLinear, "mlp.down": RowLinear}
    expected = {f"layers.{i}.{name}": kind for i in range(2) for name, kind in linears.items()}
    expected["loss_head.head"] = ColumnLinear
    assert {n: type(m) for n, m in decoder.named_modules() if type(m) is not before[n]} == expected


@pytest.mark.parametrize("sp", [False, True])
def test_a_larger_group_replaces_embedding_loss_and_what_drops(sp: bool) -> None:
    model = resolve(Config(model=MODELS["gqa2"]), 1).model
    with torch.device("meta"):
        decoder = Decoder(model, range(model.num_layers))
    cut_model(decoder, model, Group([0, 1, 2, 3], 1), sp)
    assert isinstance(decoder.embed, VocabEmbedding)
    assert isinstance(decoder.get_submodule("loss_head.cross_entropy"), VocabCrossEntropy)
    # four ranks share two groups of six queries: each rank has three of them
    assert [decoder.get_submodule(f"layers.{i}.attn").queries for i in range(2)] == [3, 3]
    # the attention core drops by head, everything else by position if the sequence is cut
    shards = {name: m.shard for name, m in decoder.named_modules() if isinstance(m, Dropout)}
    assert {name for name, shard in shards.items() if "core" in name and shard == 1} == {
        f"layers.{i}.attn.core.dropout" for i in range(2)
    }
    assert {shard for name, shard in shards.items() if "core" not in name} == {int(sp)}


def test_a_parameter_without_a_row_has_no_shard() -> None:
    model = resolve(Config(model=BASE), 1).model
    with pytest.raises(KeyError, match=r"layers\.0\.mlp\.shift has no row in the table of parameters"):
        shard_of("layers.0.mlp.shift", (12,), model, 2, 0)
