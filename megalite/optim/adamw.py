"""AdamW over a rank's local parameters, with fp32 masters for parameters in bf16 and fp16.

Gradients arrive as sums over tokens; one factor divides by the number of tokens and clips.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite.config import OptimConfig
from megalite.config.param_groups import group_settings
from megalite.optim.apex import fused_adam


def clip_scale(c: OptimConfig, squares: float, tokens: float, loss_scale: float = 1.0) -> tuple[float, float]:
    """Return (gradient norm of the mean loss, factor for the summed gradients); zeros if `tokens` is 0.

    `squares`: Σ g² of the summed gradients, float64. `tokens`: valid tokens of the global batch. `loss_scale`: what the
    loss was multiplied by.
    """
    if tokens == 0:
        return 0.0, 0.0
    tokens *= loss_scale
    # rounded once to fp32, so that the order of the sum over ranks does not change it
    norm = float(torch.tensor(squares**0.5 / tokens, dtype=torch.float32))
    clip = min(1.0, c.clip_grad / (norm + 1e-6)) if c.clip_grad > 0 else 1.0
    return norm, clip / tokens


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019) on matrices only, unless optim.groups overrides it.

    `parameters`: {name: tensor}; under ZeRO-1, the parts that this rank updates. `main_grad`: their gradients, fp32 or
    wider. `matrices`: names of those that decay, by default those with two dims. `others`: names that get a master but
    are updated by a subclass.
    """

    def __init__(
        self,
        c: OptimConfig,
        parameters: Mapping[str, Tensor],
        main_grad: Mapping[str, Tensor],
        matrices: Collection[str] | None = None,
        others: Collection[str] = (),
    ) -> None:
        self.parameters, self.main_grad = parameters, main_grad
        self.masters: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            own = parameter.dtype == main_grad[name].dtype
            master = parameter if own else parameter.detach().to(main_grad[name].dtype, copy=True)
            master.grad = main_grad[name]
            self.masters[name] = master
        if matrices is None:
            matrices = {name for name, m in self.masters.items() if m.dim() >= 2}
        by_settings: dict[tuple[float, float], list[Tensor]] = {}
        self.updated = [name for name in self.masters if name not in others]
        for name in self.updated:
            master = self.masters[name]
            by_settings.setdefault(group_settings(c, name, name in matrices), []).append(master)
        groups = [
            {"params": masters, "lr_scale": lr_scale, "weight_decay": decay}
            for (lr_scale, decay), masters in by_settings.items()
        ]
        make: Any = partial(torch.optim.AdamW, fused=True) if c.name != "apex_adamw" else fused_adam()
        # a ZeRO share may contain no parameter for Adam
        self.torch: Any = make(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps) if groups else None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the masters at learning rate `lr`, then the parameters."""
        if self.torch is not None:
            for group in self.torch.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.torch.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def adopt(self) -> None:
        """Copy the parameters into the masters, after loading weights without optimizer state."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    self.masters[name].copy_(parameter)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {parameter name: tensor}} of the optimizer state to checkpoint; creates missing state as zeros."""
        kinds: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
        for name in self.updated:
            master = self.masters[name]
            state = self.torch.state[master]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            for kind in kinds:
                kinds[kind][name] = state[kind]
        masters = {n: m for n, m in self.masters.items() if m is not self.parameters[n]}
        return kinds | ({"master": masters} if masters else {})

    def set_step(self, step: int) -> None:
        """Set the number of updates, without skipped steps, on which Adam's bias correction depends."""
        self.state()
        for name in self.updated:
            self.torch.state[self.masters[name]]["step"].fill_(float(step))
        for group in self.torch.param_groups if self.torch is not None else ():
            group["step"] = step  # apex counts here
