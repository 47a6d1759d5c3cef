"""Shapes of parameters, whole and on one rank, against the modules of the model and the cuts of tensor parallelism."""

import pytest
import torch
from families import GPT2, MODELS, decoder_of, model_of
from models import tiny

from megalite.config import Config, ParallelConfig, TuneConfig, resolve
from megalite.config.check import valid_tp
from megalite.config.parameters import row_of, split_layer
from megalite.config.shapes import local_shape, projections, shape_of, shapes, sizes
from megalite.config.trained import named_shapes
from megalite.model.cut_table import cut_model, shard_of
from megalite.model.init import materialise
from megalite.model.lora import adapt
from megalite.model.names import names_there
from megalite.parallel.groups import World
from megalite.parallel.mesh import Mesh
from megalite.parallel.threads import run_threads
from megalite.plan.counts import parameters


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_the_modules(name: str) -> None:
    m = model_of(name)
    found = {name: tuple(p.shape) for name, p in decoder_of(m).named_parameters()}
    assert shapes(m) == found
    assert parameters(m) == sum(torch.Size(shape).numel() for shape in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_order_is_that_of_a_forward(name: str) -> None:
    names = list(shapes(model_of(name)))
    places = [(-1 if split_layer(n)[0] is None else split_layer(n)[0]) for n in names if row_of(n).where != "last"]
    assert places == sorted(places)
    assert row_of(names[0]).where == "first"
    assert row_of(names[-1]).where == "last"


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "factors"])
@pytest.mark.parametrize("name", MODELS)
def test_local_shapes_are_those_of_a_cut_model(name: str, lora: bool) -> None:
    """tp 2: the names and shapes of a stage's modules after cut, adapters and materialise."""
    m = model_of(name)
    tune = TuneConfig(mode="lora", lora_rank=3) if lora else TuneConfig()
    config = resolve(Config(model=m, parallel=ParallelConfig(tp=2, pp=1, dp=1), tune=tune), 2)

    def main(world: World) -> dict[str, tuple[int, ...]]:
        group = Mesh(world, tp=2, pp=1, dp=1, cp=1, kv_replicas=max(1, 2 // (m.num_kv_heads or 1))).tp
        decoder = decoder_of(m)
        cut_model(decoder, m, group, sp=True)
        adapt(decoder, config, group)
        materialise(
            decoder,
            m,
            group,
            lambda _, shape: torch.zeros(shape),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        return {n: tuple(p.shape) for n, p in decoder.named_parameters()}

    expected = {n: local_shape(row_of(n), m, 2, rank=3) for n in [*shapes(m), *config.shapes.factors]}
    assert run_threads(2, main) == [expected, expected]


@pytest.mark.parametrize("name", MODELS)
def test_local_shapes_are_those_of_the_shards(name: str) -> None:
    m = model_of(name)
    factors = named_shapes(m, TuneConfig(mode="lora", lora_rank=3)).factors
    for tp in valid_tp(m):
        for parameter, shape in [*shapes(m).items(), *factors.items()]:
            row = row_of(parameter)
            shard = shard_of(parameter, shape, m, tp, tp - 1)
            assert shape_of(row, m, rank=3) == shape
            assert local_shape(row, m, tp, rank=3) == shard.local_shape
            assert bool(row.cut) or shard.local_shape == shape
            assert not (row.cut and row.partial)  # a gradient is cut or summed, never both


def test_learned_positions_do_not_make_a_gpt2() -> None:
    other = tiny(num_layers=3, position="learned", max_positions=13, family="llama")
    assert [p.there for p in projections(other)["attn.qkv"]] == ["q_proj", "k_proj", "v_proj"]
    assert names_there("layers.1.attn.out.weight", other) == ["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(ValueError, match=r"'pos_embed\.weight' has no counterpart"):
        names_there("pos_embed.weight", other)


def test_sizes_of_a_rank_are_its_share() -> None:
    """Vocabulary rounded up; of kv heads at least one group, if need be as a replica."""
    m = tiny()
    assert sizes(m) == {"vocab": 101, "positions": 0, "hidden": 24, "ffn": 36, "head": 6, "heads": 24, "kv": 12}
    assert sizes(m, 2) == sizes(m) | {"vocab": 51, "ffn": 18, "heads": 12, "kv": 6}
    assert sizes(m, 4) == sizes(m) | {"vocab": 26, "ffn": 9, "heads": 6, "kv": 6}


def test_projections_by_hand() -> None:
    found = {name: [(p.name, p.there, p.rows, p.columns) for p in ps] for name, ps in projections(tiny()).items()}
    assert found == {
        "attn.qkv": [("q", "q_proj", 24, 24), ("k", "k_proj", 12, 24), ("v", "v_proj", 12, 24)],
        "attn.out": [("o", "o_proj", 24, 24)],
        "mlp.gate_up": [("gate", "gate_proj", 36, 24), ("up", "up_proj", 36, 24)],
        "mlp.down": [("down", "down_proj", 24, 36)],
    }
    # GPT-2 keeps query, key and value in one matrix, so they have one pair of factors
    gpt2 = projections(tiny(**GPT2, num_kv_heads=4))
    assert [(p.name, p.there, p.rows) for p in gpt2["attn.qkv"]] == [("qkv", "c_attn", 72)]


def test_a_tied_head_has_no_row() -> None:
    untied, tied = (list(shapes(tiny(tie_embeddings=tied))) for tied in (False, True))
    assert [name for name in untied if name not in tied] == ["loss_head.head.weight"]
