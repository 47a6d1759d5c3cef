"""Activation recomputation: run part of the forward pass again in backward instead of keeping its activations.

Chen et al. 2016 (whole blocks); selective recomputation of the attention core: Korthikanti et al. 2022, section 5.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

KINDS = ("none", "selective", "full")


def recomputed(forward: Callable[..., Tensor], *args: object) -> Tensor:
    """`forward(*args)`, of which autograd keeps the arguments alone; backward runs it again.

    Loss and gradients keep every bit, because the same operations run on the same inputs. Collectives in what runs
    again meet, because all ranks of a tensor-parallel group recompute the same layers.
    """
    # dropout is a function of keys, so no generator's state has to be restored
    out: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
    return out
