"""A group of one rank is the identity, and torch.distributed's collectives are found under either of their names."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megalite.parallel.groups import DistGroup, DistWorld, Group, SoloWorld, World, share_text
from megalite.parallel.threads import run_threads


@pytest.fixture
def one_rank() -> Iterator[DistWorld]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield DistWorld(torch.device("cpu"), timeout_s=10)
    dist.destroy_process_group()


def check_identity(group: Group) -> None:
    x = torch.arange(6.0).view(2, 3)
    y = x.clone()
    assert group.all_reduce(y) is y
    assert torch.equal(y, x)
    assert torch.equal(group.all_reduce(y, "max"), x)
    assert torch.equal(group.all_gather(x), x.unsqueeze(0))
    assert torch.equal(group.reduce_scatter(x.unsqueeze(0)), x)
    assert torch.equal(group.broadcast(x), y)
    group.barrier()


def test_a_group_of_one() -> None:
    check_identity(Group([3], 0))
    check_identity(SoloWorld().split([[0]]))


def test_a_distributed_group_of_one(one_rank: DistWorld) -> None:
    assert dist.group.WORLD is not None
    check_identity(DistGroup([0], 0, dist.group.WORLD))
    # alone, no process group is made
    assert type(one_rank.split([[0]])) is Group
    assert (one_rank.rank, one_rank.size) == (0, 1)


def test_a_gathered_part_may_lie_in_strides(one_rank: DistWorld) -> None:
    assert dist.group.WORLD is not None
    x = torch.arange(6.0).view(2, 3).t()
    assert torch.equal(DistGroup([0], 0, dist.group.WORLD).all_gather(x), x.unsqueeze(0))


def test_a_world_of_one_has_no_peer() -> None:
    with pytest.raises(AssertionError):
        SoloWorld().send(torch.zeros(1), 1)
    with pytest.raises(AssertionError):
        SoloWorld().receive(torch.zeros(1), 1)


@pytest.mark.parametrize(
    ("texts", "shared"),
    [
        (["", "second", None], ""),
        ([None, "床前明月光\n😀", "third"], "床前明月光\n😀"),
        ([None, None, "x" * 10_000], "x" * 10_000),
        ([None, None, None], None),
    ],
)
def test_every_rank_gets_the_text_of_the_first_that_has_one(texts: list[str | None], shared: str | None) -> None:
    def share(world: World) -> str | None:
        return share_text(world.split([[0, 1, 2]]), texts[world.rank], world.device)

    assert run_threads(3, share) == [shared] * 3


def test_a_text_on_a_distributed_group(one_rank: DistWorld) -> None:
    assert dist.group.WORLD is not None
    group = DistGroup([0], 0, dist.group.WORLD)
    assert share_text(group, "alone", one_rank.device) == "alone"
    assert share_text(group, None, one_rank.device) is None
