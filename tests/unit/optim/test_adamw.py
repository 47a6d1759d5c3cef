"""AdamW over named parameters equals torch's, decays matrices alone, and keeps fp32 masters of bf16 weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from megalite.config import OptimConfig
from megalite.optim.adamw import AdamW, clip_scale

CONFIG = OptimConfig(lr=0.05, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def optimizer(model: nn.Module, config: OptimConfig = CONFIG) -> tuple[AdamW, dict[str, Tensor]]:
    parameters = dict(model.named_parameters())
    main_grad = {
        n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()
    }
    return AdamW(config, parameters, main_grad), main_grad


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + len(name)))


def test_equals_torch() -> None:
    ours, theirs = net(), net()
    adamw, main_grad = optimizer(ours)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6, foreach=False, fused=False)
    for step, lr in enumerate((0.05, 0.02, 0.1)):
        for name, p in theirs.named_parameters():
            p.grad = gradient(name, p.shape, step)
            main_grad[name].copy_(p.grad)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        adamw.step(lr)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(adamw.state()["exp_avg"][name], reference.state[q]["exp_avg"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            adamw.state()["exp_avg_sq"][name], reference.state[q]["exp_avg_sq"], rtol=1e-6, atol=1e-7
        )


def test_matrices_alone_decay() -> None:
    """With a gradient of zero, decay is all that moves a weight."""
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adamw, _ = optimizer(model)
    adamw.step(0.05)
    for name, p in model.named_parameters():
        factor = 1 - 0.05 * 0.3 if p.dim() == 2 else 1
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_a_rank_may_have_matrices_alone() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    AdamW(CONFIG, {"p": p}, {"p": torch.zeros(2, 2)}).step(0.05)
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 1 - 0.05 * 0.3))


def test_masters_hold_what_bf16_rounds_away() -> None:
    """Updates of 1e-4 of a weight of 1 are below bf16's 2^-8: without masters it would never move."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    main_grad = {"p": torch.ones(4)}
    adamw = AdamW(CONFIG, {"p": p}, main_grad)
    assert adamw.masters["p"].dtype == torch.float32
    assert adamw.masters["p"] is not p
    for _ in range(10):
        adamw.step(1e-4)
    assert p.detach().tolist() == [1] * 4
    torch.testing.assert_close(adamw.masters["p"], torch.full((4,), 1 - 1e-3), rtol=1e-5, atol=0)
    for _ in range(90):
        adamw.step(1e-4)
    assert torch.equal(p, adamw.masters["p"].bfloat16())
    assert p[0].item() < 1
    assert p.dtype == torch.bfloat16


def test_bf16_follows_fp32() -> None:
    half = net(torch.bfloat16)
    full = net(torch.bfloat16).float()  # the same start
    (ours, ours_grad), (theirs, theirs_grad) = optimizer(half), optimizer(full)
    for step in range(5):
        for name, p in full.named_parameters():
            for grads in (ours_grad, theirs_grad):
                grads[name].copy_(gradient(name, p.shape, step))
        ours.step(0.01)
        theirs.step(0.01)
    for name, p in full.named_parameters():
        assert torch.equal(ours.masters[name], p)
        assert torch.equal(half.get_parameter(name), p.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_their_own_masters(dtype: torch.dtype) -> None:
    adamw, _ = optimizer(net(dtype))
    assert all(adamw.masters[name] is p for name, p in adamw.parameters.items())
    assert adamw.state().keys() == {"exp_avg", "exp_avg_sq"}


def test_adopt_takes_loaded_weights() -> None:
    model = net(torch.bfloat16)
    adamw, _ = optimizer(model)
    with torch.no_grad():
        model[0].weight.fill_(3)
    adamw.adopt()
    assert adamw.masters["0.weight"].unique().tolist() == [3]
    with torch.no_grad():
        adamw.masters["0.weight"].fill_(5)
    adamw.publish()
    assert model[0].weight.unique().tolist() == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_stored_state_changes_no_bit(dtype: torch.dtype) -> None:
    """Weights, `state()` and the number of steps are all there is."""

    def steps(adamw: AdamW, main_grad: dict[str, Tensor], first: int, last: int) -> None:
        for step in range(first, last):
            for name, grad in main_grad.items():
                grad.copy_(gradient(name, grad.shape, step))
            adamw.step(0.01)

    whole, first, second = net(dtype), net(dtype), net(dtype)
    steps(*optimizer(whole), 0, 6)
    stored, grads = optimizer(first)
    steps(stored, grads, 0, 3)

    resumed, grads = optimizer(second)
    assert resumed.state().keys() == {"exp_avg", "exp_avg_sq"} | ({"master"} if dtype == torch.bfloat16 else set())
    with torch.no_grad():
        for kind, tensors in stored.state().items():
            for name, tensor in tensors.items():
                resumed.state()[kind][name].copy_(tensor)
        for name, p in first.named_parameters():
            second.get_parameter(name).copy_(p)
    resumed.set_step(3)
    resumed.publish()
    steps(resumed, grads, 3, 6)
    for name, p in whole.named_parameters():
        assert torch.equal(second.get_parameter(name), p)


def test_clip_scale() -> None:
    never, at_one = OptimConfig(clip_grad=0.0), OptimConfig(clip_grad=1.0)
    # the summed gradient has norm 30, its mean over 10 tokens 3
    assert clip_scale(never, 900.0, 10.0) == (3.0, 0.1)
    norm, scale = clip_scale(at_one, 900.0, 10.0)
    assert norm == 3
    assert 30 * scale == pytest.approx(1, rel=1e-6)  # what is left after scaling
    assert 30 * scale <= 1
    # below the limit only the division by tokens
    assert clip_scale(at_one, 25.0, 10.0) == (0.5, 0.1)
    assert clip_scale(OptimConfig(clip_grad=2.0), 900.0, 10.0)[1] * 30 == pytest.approx(2, rel=1e-6)


def test_clip_scale_at_the_edges() -> None:
    assert clip_scale(OptimConfig(), 0.0, 4.0) == (0.0, 0.25)
    assert clip_scale(OptimConfig(), 0.0, 0.0) == (0.0, 0.0)  # no valid token in the whole batch: no update
    norm, scale = clip_scale(OptimConfig(clip_grad=1.0), math.inf, 4.0)
    assert math.isinf(norm)
    assert scale == 0


def test_the_norm_is_rounded_once() -> None:
    """Sums that differ in the last bits of float64, as orders of ranks do, give the same norm and scale."""
    squares = 12.3456789
    other = math.nextafter(squares, math.inf)
    assert clip_scale(OptimConfig(), squares, 7.0) == clip_scale(OptimConfig(), other, 7.0)
