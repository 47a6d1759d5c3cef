"""NVIDIA's apex is recognised by its compiled part, and its optimizer gets the same groups and state as torch's."""

import sys
import types
from typing import Any

import pytest
import torch

from megalite.config import OptimConfig
from megalite.optim.adamw import AdamW
from megalite.optim.apex import fused_adam


class FusedAdam(torch.optim.AdamW):
    """Takes what apex's takes, and keeps its count of steps where apex's does."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)


def install(monkeypatch: pytest.MonkeyPatch, **symbols: Any) -> None:
    for module in ("amp_C", "apex", "apex.optimizers"):
        found = types.ModuleType(module)
        for name, value in symbols.items():
            setattr(found, name, value)
        monkeypatch.setitem(sys.modules, module, found)


def test_without_apex_the_error_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "amp_C", None)
    with pytest.raises(ValueError, match=r"apex_adamw needs NVIDIA apex .* amp_C .*; use optim.name=adamw"):
        fused_adam()


def test_the_apex_of_the_package_index_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports, and has nothing."""
    install(monkeypatch)
    with pytest.raises(ValueError, match="amp_C has no multi_tensor_adam"):
        fused_adam()
    install(monkeypatch, multi_tensor_adam=object())
    with pytest.raises(ValueError, match=r"apex\.optimizers has no FusedAdam"):
        fused_adam()


def test_nvidias_updates_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, multi_tensor_adam=object(), FusedAdam=FusedAdam)
    found = []
    for name in ("adamw", "apex_adamw"):
        parameter, gradient = torch.nn.Parameter(torch.ones(3, 2)), torch.full((3, 2), 0.5)
        optimizer = AdamW(OptimConfig(name=name), {"p": parameter}, {"p": gradient})
        optimizer.set_step(3)
        optimizer.step(0.1)
        found.append(parameter.detach())
        assert optimizer.torch.param_groups[0]["step"] == 3
    assert torch.equal(*found)
