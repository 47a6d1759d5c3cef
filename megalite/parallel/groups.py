"""Groups of ranks and the few collectives that megalite uses, over torch.distributed.

A `World` is all ranks of a run. `World.split` divides it into groups; the pipeline uses `send` and `receive`. A second
implementation of the same interface, megalite.parallel.threads, runs every rank as a thread of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these; megalite works with 2.9 to 2.13
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending(Protocol):
    """A communication in progress; `wait` returns when its result may be used."""

    def wait(self) -> object: ...


class Done:
    """A communication that is already complete."""

    def wait(self) -> None:
        return None


class Group:
    """A group of one rank, in which every collective is the identity. Base class of the real groups.

    `ranks` are global ranks in group order; `rank` is this rank's place among them.
    """

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self.size = len(self.ranks)

    def start_all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        """Begin reducing contiguous `x` in place over the group; op: sum or max."""
        return Done()

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, Pending]:
        """Begin gathering `x` [...] from every rank into [size, ...], in group order."""
        return x.unsqueeze(0), Done()

    def start_reduce_scatter(self, x: Tensor) -> tuple[Tensor, Pending]:
        """Begin summing `x` [size, ...] over the group; this rank gets row `rank`, [...]."""
        return x[0], Done()

    def start_gather_rows(self, x: Tensor) -> Pending:
        """Begin filling contiguous `x` [size, ...] in place; each rank contributes its row `rank`."""
        return Done()

    def start_scatter_rows(self, x: Tensor) -> Pending:
        """Begin summing contiguous `x` [size, ...] in place: row `rank` gets the sum, other rows are undefined."""
        return Done()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite `x` with the one of group rank `source`."""
        return x

    def barrier(self) -> None:
        """Return when every rank of the group has called this."""

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        self.start_all_reduce(x, op).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out, pending = self.start_all_gather(x)
        pending.wait()
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out, pending = self.start_reduce_scatter(x)
        pending.wait()
        return out


def share_text(group: Group, text: str | None, device: torch.device) -> str | None:
    """The text of the first rank, in group order, that brings one; None if no rank does. Collective."""
    raw = None if text is None else text.encode(errors="replace")
    size = torch.tensor([-1 if raw is None else len(raw)], device=device)
    sizes = group.all_gather(size).flatten().tolist()
    source = next((rank for rank, length in enumerate(sizes) if length >= 0), None)
    if source is None or not sizes[source]:
        return None if source is None else ""
    shared = torch.zeros(sizes[source], dtype=torch.uint8, device=device)
    if group.rank == source and raw is not None:
        shared.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    return bytes(group.broadcast(shared, source).tolist()).decode()


def sum_numbers(group: Group, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum numbers over the group, each under its name, in one float64 all-reduce. Every rank has the same names."""
    total = group.all_reduce(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
    return dict(zip(values, total.tolist(), strict=True))


class World(Protocol):
    """All ranks of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        """The group of `parts` (disjoint lists of global ranks) that holds this rank; all ranks must call this."""
        ...

    def send(self, x: Tensor, peer: int) -> Pending:
        """Begin sending `x` to global rank `peer`; the tensor must stay unchanged until `wait` returns."""
        ...

    def receive(self, buffer: Tensor, peer: int) -> Pending:
        """Begin receiving into `buffer` from global rank `peer`; messages of one sender arrive in order."""
        ...


class SoloWorld:
    """A run of one rank, without a process group."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank, self.size = 0, 1
        self.device = device or torch.device("cpu")

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        return Group(parts[0], 0)

    def send(self, x: Tensor, peer: int) -> Pending:
        raise AssertionError("a world of one rank has no peer")

    receive = send


class DistGroup(Group):
    """A group over torch.distributed (gloo on CPU, NCCL on CUDA)."""

    def __init__(self, ranks: Sequence[int], rank: int, process_group: dist.ProcessGroup) -> None:
        super().__init__(ranks, rank)
        self.process_group = process_group

    def start_all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        reduce_op = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        work: Pending = dist.all_reduce(x, reduce_op, group=self.process_group, async_op=True)
        return work

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, Pending]:
        out = x.new_empty((self.size, *x.shape))
        return out, _all_gather(out.view(-1), x.contiguous().view(-1), group=self.process_group, async_op=True)

    def start_reduce_scatter(self, x: Tensor) -> tuple[Tensor, Pending]:
        out = x.new_empty(x.shape[1:])
        return out, _reduce_scatter(out.view(-1), x.contiguous().view(-1), group=self.process_group, async_op=True)

    def start_gather_rows(self, x: Tensor) -> Pending:
        return _all_gather(x.view(-1), x[self.rank].view(-1), group=self.process_group, async_op=True)  # type: ignore[no-any-return]

    def start_scatter_rows(self, x: Tensor) -> Pending:
        return _reduce_scatter(x[self.rank].view(-1), x.view(-1), group=self.process_group, async_op=True)  # type: ignore[no-any-return]

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        dist.broadcast(x, self.ranks[source], group=self.process_group)
        return x

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device="cuda" if dist.get_backend() == "nccl" else "cpu"))


class DistWorld:
    """All ranks of an initialised torch.distributed process group."""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self.timeout = timedelta(seconds=timeout_s)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if dist.group.WORLD is not None:
            self._groups[tuple(range(self.size))] = dist.group.WORLD

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        mine = Group([self.rank], 0)
        for part in parts:
            ranks = tuple(part)
            if len(ranks) > 1 and ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=self.timeout)
            if self.rank in ranks and len(ranks) > 1:
                mine = DistGroup(ranks, ranks.index(self.rank), self._groups[ranks])
        return mine

    def send(self, x: Tensor, peer: int) -> Pending:
        return _started(dist.isend, x, peer)

    def receive(self, buffer: Tensor, peer: int) -> Pending:
        return _started(dist.irecv, buffer, peer)


def _started(start: Callable[[Tensor, int], dist.Work | None], x: Tensor, peer: int) -> Pending:
    work = start(x, peer)
    assert work is not None
    return work
