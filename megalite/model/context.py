"""What one forward pass needs besides hidden states and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Context:
    """The second argument of every block, attention, core, linear and dropout: made once per forward pass.

    positions: [b, s], int64; of each token in its document.
    bounds: [b, s, 2], int64; each query attends to the half-open range of keys given here. None: causal attention over
        the whole sequence.
    keys: [b], int64; one dropout key per sample (`sample_keys`). None: nothing is dropped.
    rope: cos and sin, each [b, s, rot_dim / 2]. None: the decoder computes them from `positions`.
    index: [s], int64; the positions of the whole sequence that this rank holds. None: all of them.
    extra: further tensors by name, for models that need them.
    deferred: None: backward computes the gradients of weights at once. A list: backward appends one job per weight of a
        linear instead. A job computes the same product and accumulates it into `.grad`; its caller runs the jobs in
        list order, on every rank of the tensor-parallel group alike, because a job may communicate. Every parameter
        still accumulates exactly once per forward and backward: a head tied to the embedding of the same decoder is
        not deferred, since both parts of its gradient are added before they reach the weight.
    """

    positions: Tensor
    bounds: Tensor | None = None
    keys: Tensor | None = None
    rope: Rope | None = None
    index: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    deferred: list[Callable[[], None]] | None = None
