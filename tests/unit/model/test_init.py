"""Initial weights do not depend on how the model is laid out."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from megalite.config import Config, ModelConfig, ParallelConfig, TrainConfig, resolve, resolve_model
from megalite.config.shapes import shapes
from megalite.engine.engine import build
from megalite.model.decoder import Decoder
from megalite.model.init import draw, materialise
from megalite.parallel.groups import Group, World
from megalite.parallel.threads import run_threads

MODEL = resolve_model(
    ModelConfig(
        vocab_size=101,
        hidden_size=64,
        num_layers=8,
        num_heads=12,
        num_kv_heads=2,
        head_dim=4,
        ffn_hidden_size=60,
        qkv_bias=True,
        qk_norm=True,
        init_std=0.05,
    ),
    12,
)


def gathered(tied: bool, tp: int = 1, pp: int = 1, seed: int = 1, stages: tuple[int, ...] | None = None) -> dict:
    """{name: whole initial weight}, put together from all ranks; a rank that disagrees with another is told."""
    config = Config(
        model=dataclasses.replace(MODEL, tie_embeddings=tied),
        parallel=ParallelConfig(tp=tp, pp=pp, stages=stages),
        train=TrainConfig(seed=seed, seq_len=12),
    )
    config = resolve(config, tp * pp)

    def main(world: World) -> list:
        engine = build(config, world)
        return [(name, engine.shards[name], p.detach()) for name, p in engine.parameters.items()]

    ranks = run_threads(tp * pp, main)
    whole: dict[str, Tensor] = {}
    for parameters in ranks:
        for name, shard, local in parameters:
            shard.put(local, whole.setdefault(name, torch.full(shard.whole_shape, torch.nan)))
    for parameters in ranks:
        for name, shard, local in parameters:
            assert torch.equal(local, shard.cut(whole[name]))
    return whole


@functools.cache
def alone(tied: bool) -> dict[str, Tensor]:
    return gathered(tied)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("tp", "pp", "stages"), [(2, 1, None), (12, 1, None), (4, 2, None), (1, 3, (1, 6, 1)), (6, 2, None)]
)
def test_every_topology_starts_from_the_same_bits(tp: int, pp: int, stages: tuple, tied: bool) -> None:
    whole = gathered(tied, tp, pp, stages=stages)
    assert whole.keys() == alone(tied).keys()
    assert all(torch.equal(w, alone(tied)[name]) for name, w in whole.items())


def test_names_are_global() -> None:
    for tied in (False, True):
        assert sorted(alone(tied)) == sorted(shapes(dataclasses.replace(MODEL, tie_embeddings=tied)))
    assert "loss_head.head.weight" in alone(False)
    assert "loss_head.head.weight" not in alone(True)
    # the name alone, not the order of drawing, decides
    assert all(torch.equal(w, alone(False)[name]) for name, w in alone(True).items())


def test_distribution() -> None:
    for name, w in alone(False).items():
        if name.endswith("norm.weight"):
            assert bool((w == 1).all()), name
        elif name.endswith(".bias"):
            assert bool((w == 0).all()), name
        else:
            residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            std = 0.05 / (2 * 8) ** 0.5 if residual else 0.05
            # the sampling error of a std over n draws is std / sqrt(2 n)
            assert abs(w.std().item() - std) < 5 * std / (2 * w.numel()) ** 0.5, name
            assert abs(w.mean().item()) < 5 * std / w.numel() ** 0.5, name


def test_every_name_and_seed_draws_its_own() -> None:
    matrices = [w for name, w in alone(False).items() if w.dim() == 2]
    first = {w.flatten()[0].item() for w in matrices}
    assert len(first) == len(matrices)
    other = gathered(False, seed=2)
    assert not any(torch.equal(w, other[name]) for name, w in alone(False).items() if w.dim() == 2)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw("embed.weight", (4, 4), MODEL, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tied_matrix_is_one_parameter_drawn_once() -> None:
    drawn = []

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        drawn.append(name)
        return torch.ones(shape)

    model = dataclasses.replace(MODEL, tie_embeddings=True)
    with torch.device("meta"):
        decoder = Decoder(model, range(8))
    shards = materialise(decoder, model, Group([0], 0), value, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert decoder.embed is not None
    assert decoder.loss_head is not None
    assert decoder.loss_head.head.weight is decoder.embed.weight
    assert sorted(drawn) == sorted(shards) == sorted(shapes(model))
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in decoder.parameters())
