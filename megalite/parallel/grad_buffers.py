"""Gradients of a rank in one flat buffer, cut into buckets that are summed over the replicas once per step.

The reduction of a bucket starts when the last microbatch has added to its last parameter, and overlaps the backward of
the layers before it (Li et al. 2020, "PyTorch Distributed", section 3.2.3). With sharding a bucket is reduce-scattered:
each replica receives the sum of its own share, and keeps optimizer states for that share only (ZeRO stage 1,
Rajbhandari et al. 2020, section 5.1). Not every parameter need have the same replicas; those of one bucket do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from megalite.parallel.groups import Group, Pending

# Elements to which parameters and shares are aligned when sharded. A vectorised update treats the last few elements of
# a tensor by other instructions; a share that starts on a vector's boundary gets the same bits as the whole tensor.
ALIGNMENT = 64


@dataclass(eq=False)
class Bucket:
    """A contiguous part of the flat buffer, summed over `group`.

    `offsets[name]`: where in `flat` the parameter begins. `waiting`: gradients still to be added before the reduction
    may start.
    """

    number: int
    group: Group
    flat: Tensor
    offsets: dict[str, int]
    waiting: int = 0
    pending: Pending | None = None

    @property
    def names(self) -> list[str]:
        return list(self.offsets)


class GradBuffers:
    """`main_grad[name]`: the gradient of each parameter, summed over microbatches, a view of `flat`.

    `group`: the replicas over which gradients are summed; `groups[name]` replaces it for the parameters it names.
    Gradients accumulate in promote(dtype, fp32); parameters of that dtype accumulate straight into the view.
    Parameters are laid out by group, and within one in reverse, the order in which backward reaches them; one named in
    `alone` has a bucket of its own. `accumulations`: how many gradients of a parameter each microbatch adds, if it is
    not one.

    `spans[name]`: elements of the flattened local parameter that this rank, of all replicas, counts in norms and stores
    in checkpoints: its share if `sharded`; otherwise the first replica has all. `reduced[name]`: the part of the
    flattened gradient that is summed over the replicas after `finish`: [len(spans[name])] if sharded, otherwise all.
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
        groups: Mapping[str, Group] | None = None,
    ) -> None:
        self.overlap, self.sharded = overlap, sharded
        self.accumulations = accumulations or {}
        self._parameters = dict(list(parameters.items())[::-1])
        # a stage may train nothing
        first: Tensor = next(iter(self._parameters.values()), torch.empty(0))
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        per_bucket = max(1, math.ceil(bucket_bytes / self.dtype.itemsize))
        unit = ALIGNMENT if sharded else 1
        layouts = [
            (replicas, *self._offsets(bucket, unit))
            for replicas, names in self._by_group(group, groups or {})
            for bucket in self._in_buckets(names, per_bucket, alone)
        ]
        sizes = [-(-end // (unit * g.size)) * unit * g.size if sharded else end for g, _, end in layouts]
        self.flat = torch.zeros(sum(sizes), dtype=self.dtype, device=first.device)
        self.buckets = [
            Bucket(number, replicas, flat, offsets)
            for number, (flat, (replicas, offsets, _)) in enumerate(zip(self.flat.split(sizes), layouts))
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

    def _by_group(self, group: Group, groups: Mapping[str, Group]) -> list[tuple[Group, list[str]]]:
        """The parameters of each group of replicas; groups of the same ranks are one."""
        found: dict[tuple[int, ...], tuple[Group, list[str]]] = {}
        for name in self._parameters:
            replicas = groups.get(name, group)
            found.setdefault(replicas.ranks, (replicas, []))[1].append(name)
        return list(found.values())

    def _in_buckets(self, names: Iterable[str], per_bucket: int, alone: Collection[str]) -> Iterator[list[str]]:
        bucket: list[str] = []
        for name in names:
            if name in alone and bucket:
                yield bucket
                bucket = []
            bucket.append(name)
            if name in alone or sum(self._parameters[n].numel() for n in bucket) >= per_bucket:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

    def _offsets(self, names: list[str], unit: int) -> tuple[dict[str, int], int]:
        """Where each parameter begins, and where the last one ends."""
        offsets, end = {}, 0
        for name in names:
            offsets[name] = -(-end // unit) * unit
            end = offsets[name] + self._parameters[name].numel()
        return offsets, end

    def _span(self, bucket: Bucket, offset: int, numel: int) -> range:
        group = bucket.group
        if not self.sharded:
            return range(numel if group.rank == 0 else 0)
        share = bucket.flat.numel() // group.size
        low, high = (min(max(share * rank - offset, 0), numel) for rank in (group.rank, group.rank + 1))
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
        group = bucket.group
        if group.size == 1:
            return
        with record_function(f"start reducing bucket {bucket.number}"):
            if self.sharded:
                bucket.pending = group.start_scatter_rows(bucket.flat.view(group.size, -1))
            else:
                bucket.pending = group.start_all_reduce(bucket.flat)

    def finish(self) -> None:
        """Return when every bucket, or this rank's share of it, is summed over its replicas."""
        for bucket in self.buckets:
            if bucket.pending is None:
                self._start(bucket)
        for bucket in self.buckets:
            if bucket.pending is not None:
                bucket.pending.wait()

    def scale(self, factor: float) -> None:
        """Multiply what is reduced."""
        for bucket in self.buckets:
            group, flat = bucket.group, bucket.flat
            (flat.view(group.size, -1)[group.rank] if self.sharded else flat).mul_(factor)


def all_reduce_together(tensors: list[Tensor], group: Group) -> None:
    """Sum a few small tensors over the group in place, in one collective."""
    tensors = [t for t in tensors if t.numel()]
    if group.size == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    group.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(part.view_as(tensor))
