"""Parameters of a rank in flat buffers laid out as their gradients, of which each replica updates its share.

After the update the shares are gathered, bucket by bucket in the order of the forward pass, while the next step's data
are read and its first layers run: a module waits for its own parameters alone (ZeRO stage 1, Rajbhandari et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from megalite.parallel.grad_buffers import GradBuffers
from megalite.parallel.groups import Pending


class ParamBuffers:
    """Makes each of `parameters` a view of a flat buffer; `shares[name]`: this rank's part, [len(grads.spans[name])].

    Parameters of which this rank's part is empty have no share. `units` are the modules that wait before they run, each
    for the parameters in it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], grads: GradBuffers, units: Iterable[nn.Module]) -> None:
        self.group = grads.group
        self.flats: list[Tensor] = []
        self.shares: dict[str, Tensor] = {}
        bucket_of: dict[int, int] = {}
        for bucket in grads.buckets:
            first = parameters[next(iter(bucket.offsets))]
            flat = torch.zeros(bucket.flat.shape, dtype=first.dtype, device=first.device)
            for name, offset in bucket.offsets.items():
                parameter, span = parameters[name], grads.spans[name]
                place = flat[offset : offset + parameter.numel()]
                place.copy_(parameter.detach().view(-1))
                # the Parameter itself stays: modules, hooks and autograd know it
                parameter.data = place.view_as(parameter)
                bucket_of[id(parameter)] = bucket.number
                if span:
                    self.shares[name] = place[span.start : span.stop]
            self.flats.append(flat)
        self._pending: dict[int, Pending] = {}
        for unit in units:
            numbers = {bucket_of[id(p)] for p in unit.parameters() if id(p) in bucket_of}
            unit.register_forward_pre_hook(partial(self._wait, numbers))

    def gather(self) -> None:
        """Begin to give every replica the others' shares."""
        for number in reversed(range(len(self.flats))):
            with record_function(f"start gathering bucket {number}"):
                self._pending[number] = self.group.start_gather_rows(self.flats[number].view(self.group.size, -1))

    def _wait(self, numbers: Iterable[int], *_: object) -> None:
        for number in sorted(numbers, reverse=True):
            if number in self._pending:
                self._pending.pop(number).wait()

    def finish(self) -> None:
        """Return when every parameter is whole."""
        self._wait(list(self._pending))
