"""Muon on cut, fused and sharded matrices equals torch.optim.Muon on whole ones [out, in], with q, k and v separate."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from torch import Tensor, nn

from megalite.checkpoint.load import load
from megalite.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
    check,
    resolve,
)
from megalite.config.shapes import shapes
from megalite.engine.engine import build
from megalite.model.decoder import Decoder
from megalite.model.init import draw
from megalite.model.layouts import from_hf, to_hf
from megalite.optim.muon import Muon, lr_ratio, orthogonalise
from megalite.parallel.cuts import uncut
from megalite.parallel.groups import SoloWorld
from megalite.parallel.threads import run_threads
from megalite.plan.counts import describe_muon

STEPS = 20
MODEL = tiny(num_layers=3)
GPT2 = {"norm": "layernorm", "position": "learned", "max_positions": 9, "linear_bias": True, "tie_embeddings": True}
FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "sliding_window": 3},
    "qwen3": {"qk_norm": True, "head_dim": 8, "tie_embeddings": True},
    "stablelm": {"norm": "layernorm", "qkv_bias": True, "rope_fraction": 0.34},
    "gpt2": {**GPT2, "activation": "gelu_tanh", "num_kv_heads": 4},
    "gpt2-grouped": {**GPT2, "activation": "gelu"},
    "gpt2-gated": {**GPT2, "activation": "swiglu", "num_kv_heads": 1},
    "ungated": {"activation": "gelu"},
    "ungated-biases": {"activation": "gelu_tanh", "linear_bias": True, "num_kv_heads": 1},
    "geglu": {"activation": "geglu_tanh", "linear_bias": True},
}


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    seed = sum(map(ord, name)) + 1000 * step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(rule: str, zero: int = 0, model: ModelConfig = MODEL, **mesh: int) -> Config:
    ranks = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    parallel = ParallelConfig(zero=zero, bucket_mb=0.01, **{"tp": 1, "pp": 1, **mesh})
    optim = OptimConfig(name="muon", lr=0.02, weight_decay=0.1, muon_lr_rule=rule)
    found = resolve(Config(model, parallel, optim=optim, train=TrainConfig(seq_len=8)), ranks)
    check(found, ranks)
    return found


def reference(c: Config) -> dict[str, Tensor]:
    """Whole parameters after STEPS steps of torch's Muon on the matrices of hidden layers, its AdamW on the rest."""
    wholes = {}
    with torch.device("meta"):
        sizes = {n: tuple(p.shape) for n, p in Decoder(c.model, range(c.model.num_layers)).named_parameters()}
    separate: dict[str, nn.Parameter] = {}
    names = list(shapes(c.model))
    # the layout in which the matrices of every family are separate and [out, in]
    layout = dataclasses.replace(c.model, family="llama")
    matrices = [n for n in names if n.startswith("layers.") and len(sizes[n]) == 2]

    def unfused(name: str, whole: Tensor) -> dict[str, Tensor]:
        return {name: whole} if name == "pos_embed.weight" else to_hf(name, whole, layout)

    for name in names:
        for there, x in unfused(name, draw(name, sizes[name], c.model, c.train.seed)).items():
            separate[there] = nn.Parameter(x.clone())
    hidden = [separate[there] for n in matrices for there in unfused(n, torch.empty(sizes[n]))]
    ids = set(map(id, hidden))
    rest = [p for p in separate.values() if id(p) not in ids]
    rule = c.optim.muon_lr_rule
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn=rule)
    decayed = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1}]
    plain = [{"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(decayed + plain, lr=0.02, betas=(c.optim.beta1, c.optim.beta2), eps=c.optim.eps)
    for step in range(STEPS):
        for name in names:
            for there, x in unfused(name, gradient(name, sizes[name], step)).items():
                separate[there].grad = x.clone()
        muon.step()
        adamw.step()
    for name in names:
        there = separate.get(name)
        wholes[name] = from_hf(lambda n: separate[n].detach(), name, layout) if there is None else there.detach()
    return wholes


def largest_error(c: Config) -> float:
    """Of a parameter after STEPS steps, relative to the largest of its tensor, over all ranks."""
    expected = reference(c)

    def main(world: Any) -> dict[str, float]:
        engine = build(c, world)
        for step in range(STEPS):
            for name, view in engine.grads.main_grad.items():
                whole = gradient(name, engine.shards[name].whole_shape, step)
                view.copy_(engine.shards[name].cut(whole))
            engine.update(0.02, 1.0)
        engine.state()
        errors = {}
        for name, parameter in engine.parameters.items():
            whole = expected[name]
            errors[name] = (
                (parameter.detach() - engine.shards[name].cut(whole)).abs().max() / whole.abs().max()
            ).item()
        return errors

    p = c.parallel
    return max(max(errors.values()) for errors in run_threads(p.tp * p.pp * p.dp, main))


@pytest.mark.parametrize("rule", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"tp": 2},
        {"tp": 4},
        {"tp": 2, "dp": 2, "zero": 1},
        {"dp": 4, "zero": 1},
        {"tp": 2, "pp": 2, "dp": 2, "zero": 1},
    ],
    ids=str,
)
def test_equals_torch_on_whole_unfused_matrices(rule: str, cuts: dict[str, int]) -> None:
    worst = largest_error(config(rule, **cuts))
    print(f"{cuts} {rule}: {worst:.1e}")
    assert worst <= 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_hidden_and_nothing_else_is(family: str) -> None:
    c = config("original", model=tiny(num_layers=3, **FAMILIES[family]))
    parameters = dict(Decoder(c.model, range(c.model.num_layers)).named_parameters())
    expected = {n for n, p in parameters.items() if n.startswith("layers.") and p.dim() == 2}
    assert set(c.shapes.hidden) == expected
    kinds = {re.sub(r"\d+", "N", name) for name in expected}
    up = "gate_up" if c.model.gated else "up"
    assert kinds == {f"layers.N.{name}.weight" for name in ("attn.qkv", "attn.out", f"mlp.{up}", "mlp.down")}

    engine = build(c, SoloWorld())
    assert isinstance(engine.optimizer, Muon)
    state = engine.state()
    assert set(state["momentum"]) == expected
    assert set(state["exp_avg"]) == set(engine.parameters) - expected
    by_muon = sum(parameters[name].numel() for name in expected)
    assert f"Muon updates {by_muon / 1e6:.4g}e6 parameters in 12 matrices, AdamW the other " in describe_muon(c)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
@pytest.mark.parametrize("cuts", [{}, {"tp": 2, "dp": 2, "zero": 1}], ids=str)
def test_every_family_equals_torch(family: str, cuts: dict[str, int]) -> None:
    # Jordan's rule distinguishes [out, in] from [in, out]
    c = config("original", model=tiny(num_layers=3, **FAMILIES[family]), **cuts)
    assert largest_error(c) <= 2e-6


@pytest.mark.parametrize(
    "tune", [{"mode": "lora"}, {"mode": "bitfit"}, {"freeze": "layers.*"}, {"freeze": "*.mlp.* *.attn.*"}], ids=str
)
def test_muon_with_no_hidden_matrix_to_train_is_refused(tune: dict[str, str]) -> None:
    model = dataclasses.replace(MODEL, linear_bias=True)
    optim, base = OptimConfig(name="muon"), CheckpointConfig(load="base")
    with pytest.raises(ConfigError, match=r"optim.name=muon is for hidden matrices, and tune.mode=.* trains none"):
        check(resolve(Config(model, optim=optim, tune=TuneConfig(**tune), checkpoint=base), 1), 1)


def test_a_checkpoint_in_which_adamw_updated_a_hidden_matrix_is_refused_by_name(tmp_path: Path) -> None:
    name = "layers.0.mlp.up.weight"
    manifest = {"tensors": {f"exp_avg.{name}": {"shape": [4, 4], "blocks": []}}}
    local = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"no tensor momentum.layers.0.mlp.up.weight; .* by AdamW; take its weights"):
        load(tmp_path, manifest, {name: uncut((4, 4), 0)}, {"momentum": {name: local}})


def test_orthogonalise_gives_singular_values_about_one() -> None:
    for shape in ((8, 24), (24, 8), (16, 16)):
        values = torch.linalg.svdvals(orthogonalise(gradient("x", shape, 0)).float())
        assert 0.5 < values.min() <= values.max() < 1.3


def test_lr_ratio() -> None:
    assert lr_ratio("original", 4, 16) == 1
    assert lr_ratio("original", 16, 4) == 2
    assert lr_ratio("match_rms_adamw", 16, 4) == lr_ratio("match_rms_adamw", 4, 16) == 0.8
