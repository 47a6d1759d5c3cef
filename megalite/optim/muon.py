"""Muon (Jordan et al. 2024): orthogonalised momentum for the matrices of hidden layers, AdamW for everything else.

Each matrix is orthogonalised whole, as [out, in], however it is cut over tp or sharded over replicas. Fused matrices
are split first: query, key and value separately, gate and up separately. This holds for every model family, regardless
of how its Hugging Face files store a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from megalite.config import OptimConfig, ResolvedModel
from megalite.config.param_groups import group_settings
from megalite.model.layouts import from_hf, to_hf
from megalite.optim.adamw import AdamW
from megalite.parallel.cuts import Shard
from megalite.parallel.groups import Group

# coefficients of the quintic iteration, chosen by Jordan for the steepest slope at zero: it converges to about 1
A, B, C = 3.4445, -4.7750, 2.0315
STEPS, EPS = 5, 1e-7


def orthogonalise(x: Tensor) -> Tensor:
    """Approximately U Vᵀ for x = U S Vᵀ, [m, n], by Newton-Schulz iteration in bf16, as in torch.optim.Muon."""
    tall = x.shape[0] > x.shape[1]
    y = x.bfloat16()
    y = y.T if tall else y
    y = y / y.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=B, alpha=C), y, beta=A)
    return y.T if tall else y


def lr_ratio(rule: str, rows: int, columns: int) -> float:
    """The factor on the learning rate of a [rows, columns] matrix, by optim.muon_lr_rule.

    match_rms_adamw: updates as large as AdamW's, so that one learning rate serves both (Liu et al. 2025, "Muon is
    Scalable for LLM Training", section 2.2). original: Jordan's.
    """
    return 0.2 * math.sqrt(max(rows, columns)) if rule == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


class Muon(AdamW):
    """AdamW with Muon's update, and `momentum` as its state, for the `hidden` matrices.

    `shards`: of every parameter on this stage. `held(name)`: the range of the flattened local parameter that
    `parameters[name]` covers. `sharded`: whether replicas hold different ranges (ZeRO-1). The ranks of tp x dp
    orthogonalise the matrices in turn, so that no work is done twice.
    """

    def __init__(
        self,
        c: OptimConfig,
        parameters: Mapping[str, Tensor],
        main_grad: Mapping[str, Tensor],
        matrices: Collection[str],
        *,
        hidden: Collection[str],
        model: ResolvedModel,
        shards: Mapping[str, Shard],
        held: Callable[[str], range],
        sharded: bool,
        tp: Group,
        dp: Group,
    ) -> None:
        self.hidden = [name for name in shards if name in hidden]
        super().__init__(c, parameters, main_grad, matrices, others=self.hidden)
        # in Llama's layout, the matrices of every family are separate and [out, in]
        self.layout = dataclasses.replace(model, family="llama")
        self.c, self.shards, self.held = c, shards, held
        self.sharded, self.tp, self.dp = sharded, tp, dp
        some = next(iter(main_grad.values()), torch.empty(0))
        self.wide, self.device = some.dtype, some.device
        self.momentum = {n: torch.zeros_like(self.masters[n]) for n in self.hidden if n in self.masters}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        found: dict[str, Tensor] = {}
        for turn, name in enumerate(self.hidden):
            direction = self._direction(name)
            if self._whose(turn) == (self.tp.rank, self.dp.rank):
                parts = {there: orthogonalise(x) for there, x in to_hf(name, direction, self.layout).items()}
                found[name] = from_hf(parts.__getitem__, name, self.layout).contiguous()
        for turn, name in enumerate(self.hidden):
            self._update(name, self._from_its_rank(turn, name, found.pop(name, None)), lr)
        super().step(lr)

    def _whose(self, turn: int) -> tuple[int, int]:
        """(tp rank, dp rank) of the rank whose turn it is."""
        return turn % self.tp.size, turn // self.tp.size % self.dp.size

    def _direction(self, name: str) -> Tensor:
        """Nesterov momentum of the whole parameter, summed over ranks that each contribute the blocks they own."""
        shard = self.shards[name]
        whole = torch.zeros(shard.whole_shape, dtype=self.wide, device=self.device)
        if name in self.momentum:
            gradient, momentum = self.main_grad[name], self.momentum[name]
            momentum.lerp_(gradient, 1 - self.c.muon_momentum)
            local, held = gradient.lerp(momentum, self.c.muon_momentum), self.held(name)
            for block in shard.blocks(held):
                if block.owned:
                    place = tuple(slice(start, start + size) for start, size in zip(block.start, block.size))
                    whole[place] = shard.view(local, block, held.start)
        self.tp.all_reduce(whole)
        return self.dp.all_reduce(whole) if self.sharded else whole

    def _from_its_rank(self, turn: int, name: str, mine: Tensor | None) -> Tensor:
        """Broadcast the whole orthogonal matrix from the rank whose turn it was."""
        by_tp, by_dp = self._whose(turn)
        whole = mine
        if whole is None:
            whole = torch.empty(self.shards[name].whole_shape, dtype=torch.bfloat16, device=self.device)
        if self.dp.rank == by_dp:
            self.tp.broadcast(whole, by_tp)
        return self.dp.broadcast(whole, by_dp)

    def _update(self, name: str, whole: Tensor, lr: float) -> None:
        if name not in self.masters:
            return
        master, held = self.masters[name], self.held(name)
        rule, parts = self.c.muon_lr_rule, to_hf(name, whole, self.layout)
        scaled = {there: x.to(master.dtype) * lr_ratio(rule, *x.shape) for there, x in parts.items()}
        local = self.shards[name].cut(from_hf(scaled.__getitem__, name, self.layout)).view(-1)
        lr_scale, decay = group_settings(self.c, name, matrix=True)
        master.mul_(1 - lr * lr_scale * decay)
        master.add_(local[held.start : held.stop].view_as(master), alpha=-lr * lr_scale)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {**super().state(), "momentum": self.momentum}
