"""What is trained, by name, and how each mistake is told."""

import dataclasses
import math

import pytest
from models import TINY

from megalite.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    ModelConfig,
    OptimConfig,
    Resolved,
    TuneConfig,
    check,
    resolve,
)
from megalite.config.shapes import shapes
from megalite.config.trained import adapted
from megalite.plan import counts
from megalite.plan.costs import memory

MODEL = TINY


def config(mode: str = "lora", model: ModelConfig = MODEL, **tune: object) -> Resolved:
    return resolve(Config(model=model, tune=TuneConfig(mode=mode, **tune), checkpoint=CheckpointConfig(load="base")), 1)


def refused(c: Resolved) -> str:
    with pytest.raises(ConfigError) as caught:
        check(c, 1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("", {"attn.qkv": "qkv", "attn.out": "o", "mlp.gate_up": ["gate", "up"], "mlp.down": ["down"]}),
        ("q_proj v_proj", {"attn.qkv": "qv"}),
        ("attn.* up_proj", {"attn.qkv": "qkv", "attn.out": "o", "mlp.gate_up": ["up"]}),
    ],
)
def test_targets(targets: str, chosen: dict) -> None:
    c = config(lora_targets=targets)
    found = {name: [p.name for p in inside] for name, inside in adapted(c.model, c.tune).items()}
    assert found == {f"layers.{i}.{name}": list(inside) for i in range(2) for name, inside in chosen.items()}


def test_one_layer() -> None:
    c = config(lora_targets="layers.1.attn.qkv", lora_rank=3)
    assert c.shapes.factors == {
        "layers.1.attn.qkv.lora_q.a": (3, 24),
        "layers.1.attn.qkv.lora_q.b": (24, 3),
        "layers.1.attn.qkv.lora_k.a": (3, 24),
        "layers.1.attn.qkv.lora_k.b": (12, 3),
        "layers.1.attn.qkv.lora_v.a": (3, 24),
        "layers.1.attn.qkv.lora_v.b": (12, 3),
    }
    assert c.shapes.trained == c.shapes.factors
    assert "trains 0.00036e6 of" in counts.describe_trained(c)


def test_modes() -> None:
    biased = dataclasses.replace(MODEL, linear_bias=True)
    assert {name.split(".", 2)[2] for name in config("bitfit", biased).shapes.trained} == {
        f"{name}.bias" for name in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")
    }
    assert set(config("ffn_only").shapes.trained) == {
        f"layers.{i}.mlp.{name}.weight" for i in range(2) for name in ("gate_up", "down")
    }
    assert set(config("full").shapes.trained) == set(shapes(MODEL))
    assert set(config("full", freeze="embed.* layers.*").shapes.trained) == {
        "loss_head.norm.weight",
        "loss_head.head.weight",
    }


def test_mistakes() -> None:
    assert "similar names: q_proj" in refused(config(lora_targets="q_prj"))
    assert "tune.freeze: layers.7.* matches nothing; similar names: layers." in refused(
        config("full", freeze="layers.7.*")
    )
    assert "leaves nothing of tune.mode=full to train" in refused(config("full", freeze="*"))
    assert "this model has none (model.qkv_bias, linear_bias and norm=layernorm" in refused(config("bitfit"))
    assert "name it with checkpoint.load=RUN" in refused(dataclasses.replace(config(), checkpoint=CheckpointConfig()))
    assert "tune.lora_rank=8 has no effect with tune.mode=full" in refused(config("full", lora_rank=8))
    assert "tune.lora_targets=q_proj has no effect with tune.mode=full" in refused(
        config("full", lora_targets="q_proj")
    )
    with pytest.raises(ConfigError, match=r"tune\.lora_rank=0 must be at least 1"):
        config(lora_rank=0)
    muon = dataclasses.replace(config(), optim=OptimConfig(name="muon", decay_samples=10))
    assert "optim.name=muon is for hidden matrices, and tune.mode=lora trains none" in refused(muon)


def test_memory_counts_what_is_trained() -> None:
    """Weights whole; gradients and moments of what is trained, 4 and 8 bytes a parameter in fp32."""
    whole = memory(config("full"), "cpu")
    for c in (config(), config("ffn_only"), config("full", freeze="layers.0.*")):
        count = sum(math.prod(shape) for shape in c.shapes.trained.values())
        found = memory(c, "cpu")
        assert (found.gradients, found.optimizer) == (4 * count, 8 * count)
        assert found.weights == whole.weights + 4 * sum(math.prod(s) for s in c.shapes.factors.values())


def test_a_frozen_matrix_costs_two_products_of_three() -> None:
    full, lora = config("full"), config()
    assert counts.run_flops(full) == counts.training_flops(full.model, full.train.seq_len)
    matrices = counts.parameters(MODEL) - 5 * 24 - 101 * 24  # without norms and the embedding
    factors = sum(math.prod(s) for s in lora.shapes.factors.values())
    assert counts.run_flops(lora) == counts.run_flops(full) - 2 * matrices + 6 * factors
