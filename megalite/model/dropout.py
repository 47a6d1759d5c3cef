"""Dropout without a generator: which elements are dropped is a function of where they stand, and of nothing else.

An element's key is hashed from (seed, sample number, site, position or head, the indices behind it), so masks do not
depend on the topology, the micro-batch size or recomputation. Sample numbers count consumed samples and never come
twice, so no step number is needed. The hash is the finalizer of SplitMix64 (Steele et al. 2014, "Fast splittable
pseudorandom number generators"), applied once per index. Dropout: Srivastava et al. 2014.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalite.model.context import Context


def _signed(x: int) -> int:
    """The int64 that has the low 64 bits of x."""
    return (x + 2**63) % 2**64 - 2**63


GOLDEN = _signed(0x9E3779B97F4A7C15)
MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
BITS = 53


def _shifted(x: Tensor, bits: int) -> Tensor:
    # int64 shifts keep the sign
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _absorb(key: Tensor, index: Tensor | int) -> Tensor:
    """A new key for each index; int64 products wrap, which is what the hash wants."""
    step = _signed((index + 1) * GOLDEN) if isinstance(index, int) else (index + 1) * GOLDEN
    x = key + step
    x = (x ^ _shifted(x, 30)).mul_(MULTIPLIERS[0])
    x = (x ^ _shifted(x, 27)).mul_(MULTIPLIERS[1])
    return x ^ _shifted(x, 31)


def sample_keys(seed: int, samples: Tensor) -> Tensor:
    """The key of each sample, int64 [b], from the run's seed and the samples' numbers [b]."""
    return _absorb(_absorb(torch.zeros_like(samples), seed), samples)


def keep_mask(keys: Tensor, site: int, shape: Sequence[int], p: float, first_row: int = 0) -> Tensor:
    """What is kept, bool [b, rows, ...] of `shape`: each element with probability 1 − p.

    keys: of the samples, int64 [b]. site: number of the place in the model. first_row: index of the first of the rows
    in the whole tensor, of which `shape` may be a part.
    """
    x = _absorb(keys, site)
    for dim, size in enumerate(shape[1:]):
        index = torch.arange(size, device=keys.device)
        x = _absorb(x.unsqueeze(-1), index + first_row if dim == 0 else index)
    return _shifted(x, 64 - BITS) >= round(p * 2**BITS)


class Dropout(nn.Module):
    """x [b, rows, ...] with elements set to 0 with probability p and the others divided by 1 − p, in training.

    `shard`: how many parts of this size stand before x along its rows, positions or heads; the only number that a cut
    changes.
    """

    def __init__(self, p: float, site: int) -> None:
        super().__init__()
        self.p, self.site, self.shard = p, site, 0

    @property
    def active(self) -> bool:
        return self.p > 0 and self.training

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Shape as x. Which elements are dropped depends on `context.keys`, so training with p > 0 needs them."""
        if not self.active:
            return x
        assert context.keys is not None, "dropout needs the keys of the samples"
        kept = keep_mask(context.keys, self.site, x.shape, self.p, self.shard * x.shape[1])
        return x.masked_fill(~kept, 0.0) / (1 - self.p)
