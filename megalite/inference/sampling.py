"""Sampling: repetition penalty, temperature, top-k, top-p, in the order of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.inference.reply import Settings


def choose(logits: Tensor, seen: Tensor, settings: Settings, generators: Sequence[torch.Generator]) -> Tensor:
    """Choose one token per row of logits [b, vocab]; returns ids [b], int64 on the CPU.

    seen: bool [b, vocab], tokens in prompt and reply. generators: CPU generators, one per row, so that a row draws the
    same tokens in any batch and on any device.
    """
    logits = penalised(logits.to(torch.promote_types(logits.dtype, torch.float32)), seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits.argmax(-1).cpu()
    kept = nucleus(top_k(logits / settings.temperature, settings.top_k), settings.top_p)
    rows = kept.softmax(-1).cpu()
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(rows, generators, strict=True)])


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones by it (Keskar et al. 2019,
    "CTRL", section 4.1, as in transformers)."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits of each row to -inf; ties with the k-th are kept; 0: unchanged."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def nucleus(logits: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens that together reach probability p, set the rest to -inf (Holtzman et al. 2020,
    section 3.1)."""
    if p >= 1:
        return logits
    ordered, index = logits.softmax(-1).sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
