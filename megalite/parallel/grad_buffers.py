"""Gradients of a rank in one flat buffer, cut into buckets that are summed over the replicas once per step.

A bucket's reduction starts when the last microbatch's gradient of its last parameter is there, so it travels while the
layers before it still compute (Li et al. 2020, "PyTorch Distributed", section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from megalite.parallel.groups import Group, Pending


@dataclass(eq=False)
class Bucket:
    """A contiguous part of the flat buffer; `waiting` counts gradients still to come before it may travel."""

    number: int
    flat: Tensor
    names: list[str]
    waiting: int = 0
    pending: Pending | None = None


class GradBuffers:
    """`main_grad[name]`: the gradient of each parameter, summed over microbatches, a view of `flat`.

    Gradients accumulate in promote(dtype, fp32); parameters of that dtype accumulate straight into the view.
    Parameters are laid out in reverse, the order in which backward reaches them.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], group: Group, bucket_bytes: float, overlap: bool
    ) -> None:
        self.group, self.overlap = group, overlap
        named = list(parameters.items())[::-1]
        self.dtype = torch.promote_types(named[0][1].dtype, torch.float32)
        self.flat = torch.zeros(sum(p.numel() for _, p in named), dtype=self.dtype, device=named[0][1].device)
        self.main_grad: dict[str, Tensor] = {}
        self.buckets: list[Bucket] = []
        self._parameters = dict(named)
        start = offset = 0
        names: list[str] = []
        for i, (name, parameter) in enumerate(named):
            self.main_grad[name] = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            names.append(name)
            if (offset - start) * self.flat.element_size() >= bucket_bytes or i == len(named) - 1:
                self.buckets.append(Bucket(len(self.buckets), self.flat[start:offset], names))
                start, names = offset, []
        for bucket in self.buckets:
            for name in bucket.names:
                self._watch(name, self._parameters[name], bucket)

    def _watch(self, name: str, parameter: nn.Parameter, bucket: Bucket) -> None:
        view = self.main_grad[name]
        if parameter.dtype == self.dtype:
            parameter.grad = view

        def accumulated(p: Tensor) -> None:
            if p.grad is not None and p.grad is not view:
                view.add_(p.grad)
                p.grad = None
            bucket.waiting -= 1
            if bucket.waiting == 0 and self.overlap:
                self._start(bucket)

        parameter.register_post_accumulate_grad_hook(accumulated)

    def begin(self, num_microbatches: int) -> None:
        """Clear the gradients and expect `num_microbatches` backwards."""
        self.flat.zero_()
        for bucket in self.buckets:
            bucket.waiting = num_microbatches * len(bucket.names)
            bucket.pending = None

    def _start(self, bucket: Bucket) -> None:
        if self.group.size == 1:
            return
        with record_function(f"start reducing bucket {bucket.number}"):
            bucket.pending = self.group.start_all_reduce(bucket.flat)

    def finish(self) -> None:
        """Return when every bucket is summed over the group."""
        for bucket in self.buckets:
            if bucket.pending is None:
                self._start(bucket)
        for bucket in self.buckets:
            if bucket.pending is not None:
                bucket.pending.wait()


def all_reduce_together(tensors: list[Tensor], group: Group) -> None:
    """Sum a few small tensors over the group in place, in one collective."""
    if group.size == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    group.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))
