"""Shapes of parameters, whole and on a tensor-parallel rank, against modules that are cut."""

import pytest
import torch
from families import MODELS, decoder_of, model_of

from megalite.config import (
    Config,
    ParallelConfig,
    TuneConfig,
    resolve,
)
from megalite.config.check import valid_tp
from megalite.config.parameters import (
    row_of,
)
from megalite.config.shapes import local_shape, shape_of, shapes
from megalite.config.trained import named_shapes
from megalite.model.cut_table import cut_model, shard_of
from megalite.model.init import materialise
from megalite.model.lora import adapt
from megalite.parallel.groups import World
from megalite.parallel.mesh import Mesh
from megalite.parallel.threads import run_threads


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
