"""Gradients of a rank in one flat buffer, cut into buckets that are summed over the replicas once per step.

A bucket's reduction starts when the last microbatch's gradient of its last parameter is there, so it travels while the
layers before it still compute (Li et al. 2020, "PyTorch Distributed", section 3.2.3). Sharded, a bucket is
reduce-scattered: each replica gets the sum of its own share, of which alone it keeps optimizer states (ZeRO stage 1,
Rajbhandari et al. 2020, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from megalite.parallel.groups import Group, Pending

# Elements to which parameters and shares are aligned when sharded. A vectorised update treats the last few elements of
# a tensor by other instructions, so where a share begins must not show: it begins where a vector does.
ALIGNMENT = 64


@dataclass(eq=False)
class Bucket:
    """A contiguous part of the flat buffer; `waiting` counts gradients still to come before it may travel.

    `offsets[name]`: where in `flat` the parameter begins.
    """

    number: int
    flat: Tensor
    offsets: dict[str, int]
    waiting: int = 0
    pending: Pending | None = None

    @property
    def names(self) -> list[str]:
        return list(self.offsets)


class GradBuffers:
    """`main_grad[name]`: the gradient of each parameter, summed over microbatches, a view of `flat`.

    Gradients accumulate in promote(dtype, fp32); parameters of that dtype accumulate straight into the view.
    Parameters are laid out in reverse, the order in which backward reaches them; one named in `alone` has a bucket of
    its own. `accumulations`: how many gradients of a parameter each microbatch adds, where it is not one.

    `spans[name]`: elements of the flattened local parameter that this rank answers for, of all ranks of `group`: its
    share when `sharded`, else rank 0 has all. `reduced[name]`: the part of the flattened gradient that is summed over
    the group after `finish`, [len(spans[name])] when sharded, else all of it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        group: Group,
        bucket_bytes: float,
        overlap: bool,
        sharded: bool = False,
        alone: Collection[str] = (),
        accumulations: Mapping[str, int] | None = None,
    ) -> None:
        self.group, self.overlap, self.sharded = group, overlap, sharded
        self.accumulations = accumulations or {}
        self._parameters = dict(list(parameters.items())[::-1])
        # a stage may train nothing
        first: Tensor = next(iter(self._parameters.values()), torch.empty(0))
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        per_bucket = max(1, math.ceil(bucket_bytes / self.dtype.itemsize))
        unit = ALIGNMENT if sharded else 1
        layouts = [self._offsets(names, unit) for names in self._in_buckets(per_bucket, alone)]
        sizes = [-(-end // (unit * group.size)) * unit * group.size if sharded else end for _, end in layouts]
        self.flat = torch.zeros(sum(sizes), dtype=self.dtype, device=first.device)
        self.buckets = [
            Bucket(number, flat, offsets)
            for number, (flat, (offsets, _)) in enumerate(zip(self.flat.split(sizes), layouts))
        ]
        self.main_grad: dict[str, Tensor] = {}
        self.spans: dict[str, range] = {}
        self.reduced: dict[str, Tensor] = {}
        for bucket in self.buckets:
            for name, offset in bucket.offsets.items():
                parameter = self._parameters[name]
                flat = bucket.flat[offset : offset + parameter.numel()]
                self.main_grad[name] = flat.view_as(parameter)
                self.spans[name] = self._span(bucket, offset, parameter.numel())
                self.reduced[name] = flat[self.held(name).start : self.held(name).stop]
                self._watch(name, parameter, bucket)

    def _in_buckets(self, per_bucket: int, alone: Collection[str]) -> Iterator[list[str]]:
        names: list[str] = []
        for name in self._parameters:
            if name in alone and names:
                yield names
                names = []
            names.append(name)
            if name in alone or sum(self._parameters[n].numel() for n in names) >= per_bucket:
                yield names
                names = []
        if names:
            yield names

    def _offsets(self, names: list[str], unit: int) -> tuple[dict[str, int], int]:
        """Where each parameter begins, and where the last one ends."""
        offsets, end = {}, 0
        for name in names:
            offsets[name] = -(-end // unit) * unit
            end = offsets[name] + self._parameters[name].numel()
        return offsets, end

    def _span(self, bucket: Bucket, offset: int, numel: int) -> range:
        if not self.sharded:
            return range(numel if self.group.rank == 0 else 0)
        share = bucket.flat.numel() // self.group.size
        low, high = (min(max(share * rank - offset, 0), numel) for rank in (self.group.rank, self.group.rank + 1))
        return range(low, high)

    def held(self, name: str) -> range:
        """The elements of the flattened gradient that `reduced[name]` holds."""
        return self.spans[name] if self.sharded else range(self._parameters[name].numel())

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
            bucket.waiting = num_microbatches * sum(self.accumulations.get(name, 1) for name in bucket.names)
            bucket.pending = None

    def _start(self, bucket: Bucket) -> None:
        if self.group.size == 1:
            return
        with record_function(f"start reducing bucket {bucket.number}"):
            if self.sharded:
                bucket.pending = self.group.start_scatter_rows(bucket.flat.view(self.group.size, -1))
            else:
                bucket.pending = self.group.start_all_reduce(bucket.flat)

    def finish(self) -> None:
        """Return when every bucket, or this rank's share of it, is summed over the group."""
        for bucket in self.buckets:
            if bucket.pending is None:
                self._start(bucket)
        for bucket in self.buckets:
            if bucket.pending is not None:
                bucket.pending.wait()

    def scale(self, factor: float) -> None:
        """Multiply what is reduced."""
        for bucket in self.buckets:
            (bucket.flat.view(self.group.size, -1)[self.group.rank] if self.sharded else bucket.flat).mul_(factor)


def all_reduce_together(tensors: list[Tensor], group: Group) -> None:
    """Sum a few small tensors over the group in place, in one collective."""
    tensors = [t for t in tensors if t.numel()]
    if group.size == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    group.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))
