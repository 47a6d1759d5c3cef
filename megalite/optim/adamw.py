"""AdamW over a rank's local parameters, with fp32 masters where the parameters are not fp32.

The gradients it reads are sums over tokens; the division by the number of tokens and the clipping are one scaling.
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
    """(gradient norm of the mean loss, factor for the summed gradients).

    `squares` is Σ g² of the summed gradients in float64, `tokens` the valid tokens of the global batch, `loss_scale`
    what the loss was multiplied with.
    """
    if tokens == 0:
        return 0.0, 0.0
    tokens *= loss_scale
    # rounded once to fp32, so that the order in which ranks were added does not show
    norm = float(torch.tensor(squares**0.5 / tokens, dtype=torch.float32))
    clip = min(1.0, c.clip_grad / (norm + 1e-6)) if c.clip_grad > 0 else 1.0
    return norm, clip / tokens


class AdamW:
    """Decoupled weight decay on matrices only, unless optim.groups says otherwise: norms and biases have none.

    `parameters` may be parts of parameters, as ranks hold them that share the update; `main_grad` are the gradients of
    these. `matrices` names those that decay; default: those with two dims. `others` have masters only: a subclass
    updates them.
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
        alike: dict[tuple[float, float], list[Tensor]] = {}
        self.updated = [name for name in self.masters if name not in others]
        for name in self.updated:
            master = self.masters[name]
            alike.setdefault(group_settings(c, name, name in matrices), []).append(master)
        groups = [
            {"params": masters, "lr_scale": lr_scale, "weight_decay": decay}
            for (lr_scale, decay), masters in alike.items()
        ]
        make: Any = partial(torch.optim.AdamW, fused=True) if c.name != "apex_adamw" else fused_adam()
        # a share may have nothing for Adam in it
        self.torch: Any = make(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps) if groups else None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        if self.torch is not None:
            for group in self.torch.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.torch.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters, where they are not the same tensors."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def adopt(self) -> None:
        """Take the parameters' present values as masters (weights were loaded without optimizer state)."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    self.masters[name].copy_(parameter)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{kind: {parameter name: tensor}} of what a checkpoint stores beside the weights, made if not there yet."""
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
        """Set the number of updates done (skipped steps are none), on which Adam's bias correction depends."""
        self.state()
        for name in self.updated:
            self.torch.state[self.masters[name]]["step"].fill_(float(step))
        for group in self.torch.param_groups if self.torch is not None else ():
            group["step"] = step  # where apex counts
