"""From logits to tokens: repetition penalty, temperature, top-k, top-p, in the order of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.inference.reply import Settings


def choose(logits: Tensor, seen: Tensor, settings: Settings, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id for each row of logits [b, vocab], [b] int64 on the CPU.

    seen: bool [b, vocab], the tokens that prompt and reply hold. generators: of the CPU, one a row, so that a row draws
    what it would draw alone, and the same on every device.
    """
    logits = penalised(logits.to(torch.promote_types(logits.dtype, torch.float32)), seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits.argmax(-1).cpu()
    kept = nucleus(top_k(logits / settings.temperature, settings.top_k), settings.top_p)
    rows = kept.softmax(-1).cpu()
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(rows, generators, strict=True)])


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by the penalty where they are positive, times it where not (Keskar et al. 2019,
    "CTRL", section 4.1, as transformers does it)."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    """All but the k largest of each row -inf, ties with the last of them kept; 0: as they are."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def nucleus(logits: Tensor, p: float) -> Tensor:
    """All but the likeliest tokens that together reach probability p -inf (Holtzman et al. 2020, section 3.1)."""
    if p >= 1:
        return logits
    ordered, index = logits.softmax(-1).sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
