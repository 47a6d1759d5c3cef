"""Muon over cut, fused and shared matrices equals torch.optim.Muon on the whole ones that Hugging Face's layout has."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalite.build import build
from megalite.config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig, check, resolve
from megalite.model.decoder import Decoder
from megalite.model.hf import from_hf, global_names, to_hf
from megalite.model.init import draw
from megalite.optim.muon import HIDDEN, lr_ratio, orthogonalise
from megalite.parallel.threads import run_threads

STEPS = 20
MODEL = ModelConfig(vocab_size=101, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, ffn_hidden_size=36)


def gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    seed = sum(map(ord, name)) + 1000 * step
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(rule: str, zero: int = 0, **mesh: int) -> Config:
    ranks = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    parallel = ParallelConfig(zero=zero, bucket_mb=0.01, **{"tp": 1, "pp": 1, **mesh})
    optim = OptimConfig(name="muon", lr=0.02, weight_decay=0.1, muon_lr_rule=rule)
    found = resolve(Config(MODEL, parallel, optim=optim, train=TrainConfig(seq_len=8)), ranks)
    check(found, ranks)
    return found


def reference(c: Config) -> dict[str, Tensor]:
    """Whole parameters after STEPS steps of torch's Muon on the matrices of hidden layers, its AdamW on the rest."""
    wholes = {}
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in Decoder(c.model, range(c.model.num_layers)).named_parameters()}
    apart: dict[str, nn.Parameter] = {}
    names = global_names(c.model)
    for name in names:
        for there, x in to_hf(name, draw(name, shapes[name], c.model, c.train.seed), c.model).items():
            apart[there] = nn.Parameter(x.clone())
    hidden = [apart[there] for n in names if HIDDEN.fullmatch(n) for there in to_hf(n, torch.empty(shapes[n]), c.model)]
    ids = set(map(id, hidden))
    rest = [p for p in apart.values() if id(p) not in ids]
    rule = c.optim.muon_lr_rule
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn=rule)
    decayed = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1}]
    plain = [{"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(decayed + plain, lr=0.02, betas=(c.optim.beta1, c.optim.beta2), eps=c.optim.eps)
    for step in range(STEPS):
        for name in names:
            for there, x in to_hf(name, gradient(name, shapes[name], step), c.model).items():
                apart[there].grad = x.clone()
        muon.step()
        adamw.step()
    for name in names:
        wholes[name] = from_hf(lambda there: apart[there].detach(), name, c.model)
    return wholes


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
    c = config(rule, **cuts)
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
    worst = max(max(errors.values()) for errors in run_threads(p.tp * p.pp * p.dp, main))
    print(f"{cuts} {rule}: {worst:.1e}")
    assert worst <= 2e-6


def test_orthogonalise_gives_singular_values_about_one() -> None:
    for shape in ((8, 24), (24, 8), (16, 16)):
        values = torch.linalg.svdvals(orthogonalise(gradient("x", shape, 0)).float())
        assert 0.5 < values.min() <= values.max() < 1.3


def test_lr_ratio() -> None:
    assert lr_ratio("original", 4, 16) == 1
    assert lr_ratio("original", 16, 4) == 2
    assert lr_ratio("match_rms_adamw", 16, 4) == lr_ratio("match_rms_adamw", 4, 16) == 0.8
