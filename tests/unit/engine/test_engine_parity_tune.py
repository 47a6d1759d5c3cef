"""What is trained, at every kind of topology: loss and the gradients of that, and of nothing else, in float64.

The reference of LoRA computes with W + (alpha / r) B A, written here from the definition; that of the other modes is
the model's own, of whose gradients they have a part.
"""

import dataclasses
from typing import Any

import pytest
import torch
from formulas import GPT2, formula_reference, largest_error, loss_of, make_config, numbered
from parity import TOLERANCE
from torch import Tensor

from megalite.config import CheckpointConfig, Config, TuneConfig, check
from megalite.config.parameters import is_factor
from megalite.config.shapes import shapes
from megalite.engine.engine import build
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads

RANK, ALPHA = 3, 4.0
Weights = dict[str, Tensor]


def tuned(tune: dict[str, Any], model: dict[str, Any], parallel: dict[str, Any]) -> Config:
    """A checked float64 configuration; LoRA's names a base, which these tests give as weights."""
    p = {"tp": 1, "pp": 1, "dp": 1} | parallel
    lora = {"lora_rank": RANK, "lora_alpha": ALPHA} if tune.get("mode") == "lora" else {}
    config = dataclasses.replace(
        make_config({"num_layers": 3} | model, parallel),
        tune=TuneConfig(**(lora | tune)),
        checkpoint=CheckpointConfig(load="base"),
    )
    check(config, p["tp"] * p["pp"] * p["dp"])
    return config


def random_weights(config: Config) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.empty(shape, dtype=torch.float64).normal_(
            1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator
        )
        for name, shape in (shapes(config.model) | config.shapes.factors).items()
    }


def with_factors(w: Weights, config: Config) -> Weights:
    """The weights of the model without factors that computes the same."""
    m = config.model
    queries, d = m.num_heads // m.num_kv_heads * m.head_dim, m.head_dim
    found = dict(w)
    for linear in {name.partition(".lora_")[0] for name in w if is_factor(name)}:

        def delta(projection: str, rows: int, linear: str = linear) -> Tensor:
            a, b = (w.get(f"{linear}.lora_{projection}.{f}") for f in "ab")
            whole = w[f"{linear}.weight"]
            return whole.new_zeros(rows, whole.shape[1]) if a is None else ALPHA / RANK * b @ a

        rows = len(w[f"{linear}.weight"])
        if linear.endswith("qkv") and m.position == "rope":
            groups = range(m.num_kv_heads)
            q, k, v = (delta(p, n * d) for p, n in (("q", m.num_heads), ("k", len(groups)), ("v", len(groups))))
            change = torch.cat(
                [x for g in groups for x in (q[g * queries :][:queries], k[g * d :][:d], v[g * d :][:d])]
            )
        elif linear.endswith("gate_up"):
            change = torch.cat([delta("gate", rows // 2), delta("up", rows // 2)])
        else:
            (change,) = (delta(p, rows) for p in ("qkv", "o", "up", "down") if f"{linear}.lora_{p}.a" in w)
        found[f"{linear}.weight"] = w[f"{linear}.weight"] + change
    return found


def lora_reference(config: Config) -> tuple[Weights, float, Weights]:
    weights = random_weights(config)
    wanted = {name: weights[name].requires_grad_() for name in config.shapes.trained}
    losses = [loss_of(with_factors(weights, config), config.model, mb, False, 0.0) for mb in numbered(False)]
    sum(losses).backward()
    grads = {name: w.grad for name, w in wanted.items()}
    return {name: w.detach() for name, w in weights.items()}, sum(losses).item(), grads


PARALLEL: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp2-sp": {"tp": 2, "sp": True},
    "tp4-sp": {"tp": 4, "sp": True},  # two ranks a kv group
    "tp4-pp3": {"tp": 4, "pp": 3},
    "tp2-sp-pp2-dp2-zero": {"tp": 2, "sp": True, "pp": 2, "dp": 2, "zero": 1},
    "tp4-sp-dp2-zero": {"tp": 4, "sp": True, "dp": 2, "zero": 1},
    "pp3-gpipe-full": {"pp": 3, "schedule": "gpipe", "recompute": "full"},
    "tp2-sp-selective": {"tp": 2, "sp": True, "recompute": "selective"},
    "tp2-sp-interleaved": {"tp": 2, "sp": True, "schedule": "interleaved", "chunks": 3},
    "tp2-sp-pp3-zb-h1": {"tp": 2, "sp": True, "pp": 3, "schedule": "zb-h1"},
    "pp2-dp2-zero-zb-h1-full": {"pp": 2, "dp": 2, "zero": 1, "schedule": "zb-h1", "recompute": "full"},
}
TARGETS = ["", "q_proj v_proj", "layers.1.* mlp.down", "k_proj o_proj up_proj", "gate_proj layers.2.attn.qkv"]


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
@pytest.mark.parametrize("targets", TARGETS, ids=lambda t: t.replace(" ", "+") or "all")
def test_lora(targets: str, parallel: dict[str, Any]) -> None:
    config = tuned({"mode": "lora", "lora_targets": targets}, {}, parallel)
    weights, loss, grads = lora_reference(config)
    assert largest_error(config, weights, False, loss, grads) <= TOLERANCE


@pytest.mark.parametrize(
    "parallel", ["tp1", "tp4-pp3", "tp2-sp-pp2-dp2-zero", "tp2-sp-pp3-zb-h1", "tp2-sp-interleaved"]
)
@pytest.mark.parametrize(
    "model",
    [
        GPT2,
        {"num_kv_heads": 1, "tie_embeddings": True, "qkv_bias": True},
        {"activation": "gelu", "linear_bias": True, "qk_norm": True},
    ],
    ids=["gpt2", "mqa-tied", "gelu-bias-qknorm"],
)
def test_lora_of_other_models(model: dict[str, Any], parallel: str) -> None:
    config = tuned({"mode": "lora"}, model, PARALLEL[parallel])
    weights, loss, grads = lora_reference(config)
    assert largest_error(config, weights, False, loss, grads) <= TOLERANCE


MODES: dict[str, dict[str, Any]] = {
    "bitfit": {"mode": "bitfit"},
    "ffn_only": {"mode": "ffn_only"},
    "no-embedding": {"freeze": "embed.* loss_head.head.*"},
    "no-first-stage": {"freeze": "embed.* layers.0.*"},
    "no-last-stage": {"freeze": "layers.2.* loss_head.*"},
    "norms-of-the-first-layer": {"freeze": "embed.* layers.[12].* loss_head.* layers.0.mlp.* *.attn.* *.bias"},
}


@pytest.mark.parametrize("parallel", [p for p in PARALLEL if p not in ("tp2", "tp2-sp-selective")])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes(mode: dict[str, Any], parallel: str) -> None:
    tied = "freeze" not in mode
    config = tuned(mode, {"linear_bias": True, "tie_embeddings": tied}, PARALLEL[parallel])
    weights, loss, grads = formula_reference(config, False)
    names = config.shapes.trained
    assert 0 < len(names) < len(grads)
    assert largest_error(config, weights, False, loss, {name: grads[name] for name in names}) <= TOLERANCE


@pytest.mark.parametrize("parallel", [p for p in PARALLEL if p != "tp1"])
@pytest.mark.parametrize("model", [{}, {"dropout": 0.1, "attention_dropout": 0.1}], ids=["", "model-dropout"])
def test_dropout_of_lora_is_the_same_at_every_topology(model: dict[str, Any], parallel: str) -> None:
    tune = {"mode": "lora", "lora_dropout": 0.3}
    whole = tuned(tune, model, {})
    weights = random_weights(whole)

    def alone(config: Config) -> tuple[float, Weights]:
        def main(world: World) -> tuple[float, Weights]:
            engine = build(config, world, lambda name, shape: weights[name])
            loss = engine.forward_backward(numbered(False))["loss"]
            return loss, {name: grad.clone() for name, grad in engine.grads.main_grad.items()}

        return run_threads(1, main)[0]

    loss, grads = alone(whole)
    assert abs(loss - alone(tuned({"mode": "lora"}, model, {}))[0]) > 1e-6 * loss
    assert largest_error(tuned(tune, model, PARALLEL[parallel]), weights, False, loss, grads) <= TOLERANCE


@pytest.mark.parametrize("parallel", ["tp1", "tp4-pp3", "tp2-sp-pp2-dp2-zero"])
@pytest.mark.parametrize("tune", [{"mode": "lora"}, {"mode": "ffn_only"}, {"freeze": "layers.[01].* embed.*"}], ids=str)
def test_there_is_nothing_for_what_is_frozen(tune: dict[str, Any], parallel: str) -> None:
    """Buffers, moments and the plan are of what is trained; gradients of the rest are never computed."""
    config = tuned(tune, {}, PARALLEL[parallel])
    weights = random_weights(config)

    def main(world: World) -> tuple[int, int, int, set[str], set[str]]:
        engine = build(config, world, lambda name, shape: weights[name])
        dp = engine.mesh.dp
        engine.forward_backward(numbered(False)[dp.rank :: dp.size])
        moments = engine.optimizer.state()["exp_avg"]
        held = sum(
            len(engine.grads.spans[n]) if config.parallel.zero else engine.parameters[n].numel() for n in moments
        )
        with_grad = {name for name, p in engine.parameters.items() if p.grad is not None}
        local = sum(p.numel() for name, p in engine.parameters.items() if p.requires_grad)
        assert sum(x.numel() for x in moments.values()) == held
        return engine.grads.flat.numel(), local, len(moments), with_grad, set(engine.grads.main_grad)

    p = config.parallel
    ranks = run_threads(p.tp * p.pp * p.dp, main)
    for flat, local, _, with_grad, buffered in ranks:
        assert with_grad == buffered <= set(config.shapes.trained)
        assert local <= flat <= local + 64 * (len(buffered) + 2) * 2 * (p.zero or 0)
    assert set().union(*(rank[3] for rank in ranks)) == set(config.shapes.trained)
