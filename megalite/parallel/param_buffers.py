"""Parameters of a rank in flat buffers with the layout of their gradients, of which each replica updates its share.

After the update the shares are gathered, bucket by bucket in the order of the forward pass, while the next step's data
are read and its first layers run: a module waits for its own parameters only (ZeRO stage 1, Rajbhandari et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from megalite.parallel.grad_buffers import GradBuffers
from megalite.parallel.groups import Group, Pending


class ParamBuffers:
    """Turn each of `parameters` into a view of a flat buffer, one a bucket of `grads` and gathered over its replicas.

    `shares[name]`: this rank's part, [len(grads.spans[name])]; a parameter of which this rank has no element has no
    share. `units` are the modules that wait before they run, each for the parameters in it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], grads: GradBuffers, units: Iterable[nn.Module]) -> None:
        self._flats: list[tuple[Group, Tensor]] = []
        self.shares: dict[str, Tensor] = {}
        bucket_of: dict[int, int] = {}
        for bucket in grads.buckets:
            first = parameters[next(iter(bucket.offsets))]
            flat = torch.zeros(bucket.flat.shape, dtype=first.dtype, device=first.device)
            for name, offset in bucket.offsets.items():
                parameter, span = parameters[name], grads.spans[name]
                place = flat[offset : offset + parameter.numel()]
                place.copy_(parameter.detach().view(-1))
                # modules, hooks and autograd hold the Parameter object, so it stays and its data move
                parameter.data = place.view_as(parameter)
                bucket_of[id(parameter)] = bucket.number
                if span:
                    self.shares[name] = place[span.start : span.stop]
            self._flats.append((bucket.group, flat))
        self._pending: dict[int, Pending] = {}
        for unit in units:
            numbers = {bucket_of[id(p)] for p in unit.parameters() if id(p) in bucket_of}
            unit.register_forward_pre_hook(partial(self._wait, numbers))

    def gather(self) -> None:
        """Start sending every replica the shares of the others."""
        for number, (group, flat) in reversed(list(enumerate(self._flats))):
            with record_function(f"start gathering bucket {number}"):
                self._pending[number] = group.start_gather_rows(flat.view(group.size, -1))

    def _wait(self, numbers: Iterable[int], *_: object) -> None:
        for number in sorted(numbers, reverse=True):
            if number in self._pending:
                self._pending.pop(number).wait()

    def finish(self) -> None:
        """Return when every parameter is whole."""
        self._wait(list(self._pending))
