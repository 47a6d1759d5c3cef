"""Every rank of a run as a thread of one process: the same code as real ranks, without a launcher.

For stepping through with a debugger, and for the parity tests. Sums are taken in group order, so results do not depend
on thread timing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from megalite.parallel.groups import Done, Group, Pending

T = TypeVar("T")


class _Board:
    """Slots in which each thread of a group puts one value and reads those of all."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout_s)

    def exchange(self, rank: int, value: T) -> list[T]:
        self.slots[rank] = value
        self.barrier.wait()
        values = list(self.slots)
        # no thread may put its next value, or modify this one in place, before all have read
        self.barrier.wait()
        return values


class ThreadGroup(Group):
    """A group of ranks that are threads of one process."""

    def __init__(self, ranks: Sequence[int], rank: int, board: _Board) -> None:
        super().__init__(ranks, rank)
        self._board = board

    def start_all_reduce(self, x: Tensor, op: str = "sum") -> Pending:
        stacked = torch.stack(self._board.exchange(self.rank, x.detach().clone()))
        x.copy_(stacked.sum(0) if op == "sum" else stacked.amax(0))
        return Done()

    def start_all_gather(self, x: Tensor) -> tuple[Tensor, Pending]:
        return torch.stack(self._board.exchange(self.rank, x.detach().clone())), Done()

    def start_reduce_scatter(self, x: Tensor) -> tuple[Tensor, Pending]:
        rows = [other[self.rank] for other in self._board.exchange(self.rank, x.detach().clone())]
        return torch.stack(rows).sum(0), Done()

    def start_gather_rows(self, x: Tensor) -> Pending:
        x.copy_(self.all_gather(x[self.rank]))
        return Done()

    def start_scatter_rows(self, x: Tensor) -> Pending:
        x[self.rank].copy_(self.reduce_scatter(x))
        return Done()

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        return x.copy_(self._board.exchange(self.rank, x.detach().clone())[source])

    def barrier(self) -> None:
        self._board.exchange(self.rank, None)


class _Receipt:
    def __init__(self, mailbox: queue.Queue[Tensor | None], buffer: Tensor, timeout_s: float) -> None:
        self.mailbox, self.buffer, self.timeout_s = mailbox, buffer, timeout_s

    def wait(self) -> None:
        x = self.mailbox.get(timeout=self.timeout_s)
        if x is None:
            raise threading.BrokenBarrierError
        self.buffer.copy_(x)


class _Shared:
    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.boards: dict[tuple[int, ...], _Board] = {}
        # None in a mailbox: the run was aborted
        self.mail: dict[tuple[int, int], queue.Queue[Tensor | None]] = {
            (source, target): queue.Queue() for source in range(size) for target in range(size)
        }
        self.lock = threading.Lock()
        self.aborted = False

    def board(self, ranks: tuple[int, ...]) -> _Board:
        with self.lock:
            board = self.boards.setdefault(ranks, _Board(len(ranks), self.timeout_s))
            if self.aborted:
                board.barrier.abort()
            return board

    def abort(self) -> None:
        with self.lock:
            self.aborted = True
            for board in self.boards.values():
                board.barrier.abort()
            for mailbox in self.mail.values():
                mailbox.put(None)


class ThreadWorld:
    """The `World` of one thread."""

    def __init__(self, rank: int, shared: _Shared) -> None:
        self.rank, self.size = rank, shared.size
        self.device = torch.device("cpu")
        self._shared = shared

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        ranks = next(tuple(part) for part in parts if self.rank in part)
        if len(ranks) == 1:
            return Group(ranks, 0)
        return ThreadGroup(ranks, ranks.index(self.rank), self._shared.board(ranks))

    def send(self, x: Tensor, peer: int) -> Pending:
        self._shared.mail[self.rank, peer].put(x.detach().clone())
        return Done()

    def receive(self, buffer: Tensor, peer: int) -> Pending:
        return _Receipt(self._shared.mail[peer, self.rank], buffer, self._shared.timeout_s)


def run_threads(size: int, main: Callable[[ThreadWorld], T], timeout_s: float = 60.0) -> list[T]:
    """Call `main(world)` on `size` threads and return the results in rank order.

    The first exception on any rank ends all of them and is raised here.
    """
    shared = _Shared(size, timeout_s)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []
    # a broken barrier only follows from another rank's error
    echoes: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            results[rank] = main(ThreadWorld(rank, shared))
        except BaseException as error:
            (echoes if isinstance(error, threading.BrokenBarrierError) else errors).append(error)
            shared.abort()

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors or echoes:
        raise (errors + echoes)[0]
    return results
