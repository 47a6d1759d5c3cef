"""Ranks as threads: collectives, mail, and an error that ends all of them."""

import threading
import time

import pytest
import torch

from megalite.parallel.groups import Group
from megalite.parallel.threads import ThreadWorld, run_threads


def everyone(world: ThreadWorld) -> Group:
    return world.split([list(range(world.size))])


def test_results_come_in_rank_order() -> None:
    def main(world: ThreadWorld) -> tuple[int, int]:
        time.sleep(0.01 * (3 - world.rank))
        return world.rank, world.size

    assert run_threads(4, main) == [(rank, 4) for rank in range(4)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives(size: int) -> None:
    inputs = [torch.tensor([float(rank), -float(rank)]) for rank in range(size)]
    total = torch.stack(inputs).sum(0)

    def main(world: ThreadWorld) -> None:
        group, x = everyone(world), inputs[world.rank].clone()
        assert (group.rank, group.size, group.ranks) == (world.rank, size, tuple(range(size)))
        assert torch.equal(group.all_gather(x), torch.stack(inputs))
        assert torch.equal(group.all_gather(x[0]), torch.arange(float(size)))
        rows = torch.stack([10 * place + x for place in range(size)])
        assert torch.equal(group.reduce_scatter(rows), 10 * size * world.rank + total)
        assert torch.equal(x, inputs[world.rank])  # so far nothing was in place
        assert group.all_reduce(x, "max") is x
        assert x.tolist() == [size - 1, 0]
        assert torch.equal(group.all_reduce(inputs[world.rank].clone()), total)
        assert torch.equal(group.broadcast(inputs[world.rank].clone(), source=size - 1), inputs[-1])
        group.barrier()

    run_threads(size, main)


def test_what_is_changed_after_a_collective_does_not_reach_the_others() -> None:
    def main(world: ThreadWorld) -> list[torch.Tensor]:
        group, x, seen = everyone(world), torch.ones(3), []
        for _ in range(50):
            seen.append(group.all_gather(x).sum())
            x.fill_(2.0 if x[0] == 1 else 1.0)
        return seen

    for seen in run_threads(3, main):
        assert [v.item() for v in seen] == [9.0, 18.0] * 25


def test_sums_are_taken_in_rank_order() -> None:
    """(1 + 1e8) - 1e8 is not 1 in fp32 and the order decides: late threads must not change it."""
    values = [1.0, 1e8, -1e8]
    expected = torch.tensor(values).sum().item()
    for late in range(3):

        def main(world: ThreadWorld, late: int = late) -> float:
            group = everyone(world)
            time.sleep(0.02 * (world.rank == late))
            return group.all_reduce(torch.tensor([values[world.rank]])).item()

        assert run_threads(3, main) == [expected] * 3


def test_split_into_parts() -> None:
    def main(world: ThreadWorld) -> tuple[float, float, int]:
        even = world.split([[0, 2, 4], [1, 3], [5]])
        reverse = world.split([[5, 4, 3], [2, 1, 0]])
        x = torch.tensor([float(world.rank)])
        return even.all_reduce(x.clone()).item(), reverse.all_gather(x)[0].item(), reverse.rank

    found = run_threads(6, main)
    assert [f[0] for f in found] == [6, 4, 6, 4, 6, 5]
    assert [f[1] for f in found] == [2, 2, 2, 5, 5, 5]
    assert [f[2] for f in found] == [2, 1, 0, 2, 1, 0]


def test_mail_arrives_in_order_and_is_a_copy() -> None:
    def main(world: ThreadWorld) -> list[float]:
        if world.rank == 0:
            x = torch.zeros(1)
            for _ in range(3):
                world.send(x, 1).wait()
                x += 1
            return []
        buffers = [torch.empty(1) for _ in range(3)]
        pending = [world.receive(buffer, 0) for buffer in buffers]
        for p in pending:
            p.wait()
        return [buffer.item() for buffer in buffers]

    assert run_threads(2, main)[1] == [0, 1, 2]


def wait_in_a_collective(world: ThreadWorld) -> None:
    everyone(world).barrier()


def wait_for_mail(world: ThreadWorld) -> None:
    world.receive(torch.empty(1), 0).wait()


def wait_in_a_group_made_later(world: ThreadWorld) -> None:
    time.sleep(0.2)
    everyone(world).barrier()


@pytest.mark.parametrize("wait", [wait_in_a_collective, wait_for_mail, wait_in_a_group_made_later])
def test_an_error_ends_all_quickly(wait: object) -> None:
    def main(world: ThreadWorld) -> None:
        if world.rank == 0:
            time.sleep(0.1)
            raise ZeroDivisionError("rank 0 fell")
        wait(world)

    started, before = time.monotonic(), threading.active_count()
    with pytest.raises(ZeroDivisionError, match="rank 0 fell"):
        run_threads(3, main, timeout_s=20)
    assert time.monotonic() - started < 5
    assert threading.active_count() == before


def test_of_two_errors_the_first_is_raised() -> None:
    def main(world: ThreadWorld) -> None:
        time.sleep(0.2 * world.rank)
        raise ValueError(f"rank {world.rank}")

    with pytest.raises(ValueError, match="rank 0"):
        run_threads(2, main)


def test_a_rank_that_never_arrives_is_noticed_in_time() -> None:
    def main(world: ThreadWorld) -> None:
        if world.rank == 1:
            everyone(world).barrier()

    with pytest.raises(threading.BrokenBarrierError):
        run_threads(2, main, timeout_s=0.2)
