"""The table of parameters against the modules of the model, and against what a stage holds."""

import dataclasses
from typing import Any

import pytest
from families import MODELS, decoder_of, model_of
from models import tiny
from torch import nn

from megalite.config import (
    Config,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
    resolve,
)
from megalite.config.parameters import (
    TABLE,
    find_row,
    global_name,
    has_kv_rows,
    is_decayed,
    is_factor,
    is_hidden_matrix,
    is_partial,
    row_of,
)
from megalite.config.shapes import rows_of, shapes
from megalite.model.names import FAMILIES
from megalite.parallel.groups import SoloWorld, World
from megalite.parallel.threads import run_threads
from megalite.plan.costs import rank_memory

BASE = tiny(num_layers=3, ffn_hidden_size=40)


def test_every_row_is_in_some_model() -> None:
    used = {row.name for name in MODELS for row in rows_of(model_of(name))}
    assert used == {row.name for row in TABLE}
    assert len({(row.where, row.name) for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_kind_init_and_shape_of_a_row_agree(row: Any) -> None:
    name = f"layers.2.{row.name}" if row.where == "layer" else row.name
    assert row_of(name) is row
    assert (len(row.shape) == 2) == (row.kind in ("matrix", "embedding")) == is_decayed(name)
    assert row.init == {"scale": "ones", "bias": "zeros"}.get(row.kind, row.init)
    assert is_hidden_matrix(name) == (row.kind == "matrix" and row.where == "layer")
    assert not is_factor(name)
    assert set(row.hf) | set(row.targets) <= set(FAMILIES)
    assert len(row.projections) in (0, len(row.shape[0].split()))
    for modules in row.hf.values():
        assert len(modules.split()) in (1, len(row.shape[0].split()))


@pytest.mark.parametrize("name", MODELS)
def test_kinds_are_those_of_the_modules(name: str) -> None:
    """Matrices are weights of linears, embeddings of nn.Embedding, scales of norms; so Muon misses no linear."""
    m = model_of(name)
    decoder = decoder_of(m)
    for parameter in shapes(m):
        module, _, leaf = parameter.rpartition(".")
        owner = decoder.get_submodule(module)
        kind = "matrix" if isinstance(owner, nn.Linear) else "embedding" if isinstance(owner, nn.Embedding) else "scale"
        assert row_of(parameter).kind == ("bias" if leaf == "bias" else kind)


def test_factors_are_cut_as_their_linear_is() -> None:
    layer = "layers.0."
    cuts = {name: (row_of(layer + name).cut, row_of(layer + name).partial) for name in FACTORS}
    assert cuts == FACTORS
    assert all(is_factor(layer + name) and is_decayed(layer + name) for name in FACTORS)
    assert {name for name in FACTORS if has_kv_rows(layer + name)} == {
        f"attn.qkv.lora_{n}.b" for n in ("k", "v", "qkv")
    }
    assert find_row(layer + "mlp.gate_up.lora_gateup.a") is None


FACTORS = {
    **{f"attn.qkv.lora_{n}.a": ("", "sp") for n in ("q", "k", "v", "qkv")},
    "attn.qkv.lora_q.b": ("column", ""),
    "attn.qkv.lora_k.b": ("kv", ""),
    "attn.qkv.lora_v.b": ("kv", ""),
    "attn.qkv.lora_qkv.b": ("qkv", ""),
    "attn.out.lora_o.a": ("row", ""),
    "attn.out.lora_o.b": ("", "always"),
    "mlp.gate_up.lora_gate.a": ("", "sp"),
    "mlp.gate_up.lora_up.b": ("column", ""),
    "mlp.up.lora_up.a": ("", "sp"),
    "mlp.up.lora_up.b": ("column", ""),
    "mlp.down.lora_down.a": ("row", ""),
    "mlp.down.lora_down.b": ("", "always"),
}


def test_partial_gradients() -> None:
    assert is_partial("layers.0.attn.q_norm.weight", sp=False)
    assert is_partial("layers.0.attn_norm.weight", sp=True)
    assert not is_partial("layers.0.attn_norm.weight", sp=False)
    assert not is_partial("layers.0.attn.qkv.weight", sp=True)


def test_a_name_without_a_row() -> None:
    for name in ("attn.qkv.weight", "layers.0.embed.weight", "layers.x.mlp.up.weight", "layers.0.mlp.shift", ""):
        assert find_row(name) is None
    with pytest.raises(KeyError, match=r"layers\.0\.mlp\.shift has no row in the table of parameters; add one to"):
        row_of("layers.0.mlp.shift")


def test_tied_weights_have_one_name() -> None:
    assert global_name("loss_head.head.weight", tied=True) == "embed.weight"
    assert global_name("loss_head.head.weight", tied=False) == "loss_head.head.weight"
    assert global_name("layers.0.attn.qkv.weight", tied=True) == "layers.0.attn.qkv.weight"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("tp", "pp", "kv"), [(1, 1, 2), (2, 1, 2), (4, 1, 2), (2, 3, 1), (1, 2, 4)])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_plan_counts_what_a_stage_holds(mode: str, tp: int, pp: int, kv: int, tied: bool) -> None:
    from megalite.engine.engine import build

    model = dataclasses.replace(BASE, num_kv_heads=kv, qkv_bias=True, qk_norm=True, tie_embeddings=tied)
    config = Config(
        model=model,
        parallel=ParallelConfig(tp=tp, pp=pp),
        tune=TuneConfig(mode=mode, lora_rank=3),
        train=TrainConfig(seq_len=8),
    )
    config = resolve(config, tp * pp)

    def main(world: World) -> tuple[int, int, int]:
        engine = build(config, world)
        held = sum(p.numel() for p in engine.parameters.values())
        updated = sum(p.numel() for p in engine.parameters.values() if p.requires_grad)
        return engine.mesh.pp.rank, held, updated

    needs = rank_memory(config, "cpu")
    for stage, held, updated in [main(SoloWorld())] if tp * pp == 1 else run_threads(tp * pp, main):
        assert needs[stage].weights == 4 * held
        assert needs[stage].gradients == 4 * updated
