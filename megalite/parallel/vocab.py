"""Embeddings and cross entropy split over the tp ranks.

Vocabulary-parallel embedding and cross entropy after Shoeybi et al. 2019 (Megatron-LM, section 3); label smoothing:
Szegedy et al. 2016, section 7. Shapes as in tensor_parallel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.parallel.cuts import Shard
from megalite.parallel.groups import Group
from megalite.parallel.tensor_parallel import sum_over


class VocabEmbedding(nn.Module):
    """Embedding whose vocabulary rows are cut: tokens [b, s] -> [b, s, h] (or [b, s/tp, h] under sp)."""

    def __init__(self, embedding: nn.Embedding, group: Group, sp: bool, shard: Shard) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.group, self.sp = group, sp
        self.first = shard.pieces[0].start if shard.pieces else 0
        self.count = shard.pieces[0].length if shard.pieces else 0

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self.first
        elsewhere = (local < 0) | (local >= self.count)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return sum_over(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.group, self.sp)


class SequenceEmbedding(nn.Module):
    """An uncut embedding of this rank's part of the sequence: indices [b, s] -> [b, s/tp, h]."""

    def __init__(self, embedding: nn.Embedding, group: Group) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.group = group

    def forward(self, indices: Tensor) -> Tensor:
        return F.embedding(indices.chunk(self.group.size, 1)[self.group.rank], self.weight)


class _VocabCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[label] with the vocabulary cut over the group; the logits are never gathered nor changed.

    share: weight of the label itself; uniform: weight of each token of the true vocabulary (label smoothing).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: Group, first: int, count: int, share: float, uniform: float
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        shifted = logits.to(wide, copy=True)
        shifted[..., count:] = -torch.inf
        shifted -= group.all_reduce(shifted.amax(-1), "max").unsqueeze(-1)
        local = labels - first
        elsewhere = (local < 0) | (local >= count)
        local = local.masked_fill(elsewhere, 0)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        if uniform:
            target = share * target + uniform * shifted[..., :count].sum(-1)
        exp = shifted.exp_()
        both = group.all_reduce(torch.stack([target, exp.sum(-1)]))
        ctx.save_for_backward(exp.div_(both[1].unsqueeze(-1)), local, elsewhere)
        ctx.dtype, ctx.count, ctx.share, ctx.uniform = logits.dtype, count, share, uniform
        return both[1].log() - both[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        (grad_out,) = grads
        probabilities, local, elsewhere = ctx.saved_tensors
        grad = probabilities * grad_out.unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), -ctx.share * grad_out.masked_fill(elsewhere, 0.0).unsqueeze(-1))
        if ctx.uniform:
            grad[..., : ctx.count] -= ctx.uniform * grad_out.unsqueeze(-1)
        return grad.to(ctx.dtype), None, None, None, None, None, None


class VocabCrossEntropy(nn.Module):
    """Σ mask · ce over logits [b, s, vocab/tp] of a cut head, a scalar that is the same on every tp rank.

    label_smoothing: as in the plain model, over the vocabulary without padding and in training only.
    """

    def __init__(self, group: Group, shard: Shard, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.group, self.vocab_size, self.label_smoothing = group, shard.whole_shape[0], label_smoothing
        self.first = shard.pieces[0].start if shard.pieces else 0
        self.count = shard.pieces[0].length if shard.pieces else 0

    def forward(self, logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        ce: Tensor = _VocabCrossEntropy.apply(
            logits, labels, self.group, self.first, self.count, 1 - smoothing, smoothing / self.vocab_size
        )
        return (ce * loss_mask).sum()

    def whole(self, logits: Tensor) -> Tensor:
        """[b, s, vocab/tp] -> [b, s, vocab], padding dropped."""
        return self.group.all_gather(logits.contiguous()).movedim(0, -2).flatten(-2)[..., : self.vocab_size]
