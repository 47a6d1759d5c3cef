"""Where a rank stands, and with whom. The world here only writes down what it is asked: no rank is started."""

from collections.abc import Sequence
from itertools import combinations, product

import pytest
import torch

from megalite.parallel.groups import Group, SoloWorld
from megalite.parallel.mesh import AXES, GROUPS, Mesh, slices

SHAPES = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2), (3, 2, 1), (2, 1, 3), (4, 3, 2)]


class PaperWorld:
    """Remembers every `split`; a real one needs all ranks to ask alike, each time for all ranks."""

    device = torch.device("cpu")

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.asked: list[list[list[int]]] = []

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        assert sorted(rank for part in parts for rank in part) == list(range(self.size))
        self.asked.append([list(part) for part in parts])
        mine = next(part for part in parts if self.rank in part)
        return Group(mine, list(mine).index(self.rank))

    def send(self, x: torch.Tensor, peer: int) -> None: ...

    def receive(self, buffer: torch.Tensor, peer: int) -> None: ...


def meshes(tp: int, pp: int, dp: int, kv_replicas: int = 1) -> list[Mesh]:
    worlds = [PaperWorld(rank, tp * pp * dp) for rank in range(tp * pp * dp)]
    found = [Mesh(world, tp=tp, pp=pp, dp=dp, kv_replicas=kv_replicas) for world in worlds]
    assert all(world.asked == worlds[0].asked for world in worlds)
    return found


@pytest.mark.parametrize(("tp", "pp", "dp"), SHAPES)
def test_rank_and_coordinates(tp: int, pp: int, dp: int) -> None:
    for rank, mesh in enumerate(meshes(tp, pp, dp)):
        assert (mesh.tp.size, mesh.pp.size, mesh.dp.size, mesh.cp.size) == (tp, pp, dp, 1)
        assert rank == (mesh.pp.rank * dp + mesh.dp.rank) * tp + mesh.tp.rank
        assert mesh.world.ranks == tuple(range(tp * pp * dp))
        assert mesh.is_first_stage == (mesh.pp.rank == 0)
        assert mesh.is_last_stage == (mesh.pp.rank == pp - 1)


@pytest.mark.parametrize(("tp", "pp", "dp"), SHAPES)
def test_a_group_varies_in_its_own_coordinate_alone(tp: int, pp: int, dp: int) -> None:
    found = meshes(tp, pp, dp)
    axes = ("pp", "dp", "cp", "tp")
    for rank, mesh in enumerate(found):
        here = {axis: getattr(mesh, axis).rank for axis in axes}
        for axis in axes:
            group = getattr(mesh, axis)
            assert group.ranks[group.rank] == rank
            for place, other in enumerate(group.ranks):
                assert {a: getattr(found[other], a).rank for a in axes} == here | {axis: place}
                assert getattr(found[other], axis).ranks == group.ranks
        # neighbours share a node, and tp talks most
        assert mesh.tp.ranks == tuple(range(rank // tp * tp, rank // tp * tp + tp))


@pytest.mark.parametrize(("tp", "pp", "dp"), SHAPES)
def test_embed_joins_the_ends_of_one_pipeline(tp: int, pp: int, dp: int) -> None:
    for rank, mesh in enumerate(meshes(tp, pp, dp)):
        ends = mesh.is_first_stage or mesh.is_last_stage
        expected = (mesh.pp.ranks[0], mesh.pp.ranks[-1]) if ends and pp > 1 else (rank,)
        assert mesh.embed.ranks == expected
        assert mesh.embed.ranks[mesh.embed.rank] == rank


@pytest.mark.parametrize(("tp", "replicas"), [(4, 1), (4, 2), (4, 4), (6, 3)])
def test_kv_joins_neighbours_of_one_tp_group(tp: int, replicas: int) -> None:
    for rank, mesh in enumerate(meshes(tp, 2, 2, kv_replicas=replicas)):
        first = rank // replicas * replicas
        assert mesh.kv.ranks == tuple(range(first, first + replicas))
        assert set(mesh.kv.ranks) <= set(mesh.tp.ranks)
        assert mesh.kv.ranks[mesh.kv.rank] == rank


def alike(shape: tuple[int, ...], axes: tuple[str, ...]) -> dict[int, list[int]]:
    """{rank: ranks that have its coordinates but for those of `axes`}, by comparing every two ranks."""
    coordinates = list(product(*map(range, shape)))  # the last axis varies fastest
    fixed = [number for number, axis in enumerate(AXES) if axis not in axes]
    return {
        rank: [r for r, there in enumerate(coordinates) if all(there[n] == here[n] for n in fixed)]
        for rank, here in enumerate(coordinates)
    }


# pp, dp, cp, tp
FOUR = [(1, 1, 1, 1), (2, 1, 1, 3), (1, 2, 2, 1), (2, 2, 2, 2), (3, 1, 2, 2), (1, 3, 2, 1), (2, 3, 1, 4), (1, 2, 4, 3)]
SUBSETS = [axes for count in range(5) for axes in combinations(AXES, count)]


@pytest.mark.parametrize("axes", SUBSETS, ids="+".join)
@pytest.mark.parametrize("shape", FOUR)
def test_slices_of_the_mesh_by_brute_force(shape: tuple[int, ...], axes: tuple[str, ...]) -> None:
    parts = slices(shape, axes)
    assert sorted(rank for part in parts for rank in part) == list(range(len(alike(shape, axes))))
    assert {rank: part for part in parts for rank in part} == alike(shape, axes)


@pytest.mark.parametrize(("pp", "dp", "cp", "tp"), FOUR)
def test_a_group_over_several_axes(pp: int, dp: int, cp: int, tp: int) -> None:
    size = pp * dp * cp * tp
    for rank in range(size):
        mesh = Mesh(PaperWorld(rank, size), pp=pp, dp=dp, cp=cp, tp=tp)
        for axes in GROUPS:
            group = mesh.group(*axes)
            assert list(group.ranks) == alike((pp, dp, cp, tp), axes)[rank]
            assert group.ranks[group.rank] == rank
        replicas = mesh.group("dp", "cp")
        assert replicas.rank == mesh.dp.rank * cp + mesh.cp.rank
        assert mesh.group("cp", "dp") is replicas
        assert mesh.group("dp") is mesh.dp
        assert mesh.group(*AXES) is mesh.world


@pytest.mark.parametrize("axes", [("pp", "tp"), (), ("dp", "cp", "tp")])
def test_a_group_that_is_not_listed_is_refused(axes: tuple[str, ...]) -> None:
    """Created on demand, it could be created on some ranks only, which then wait for ever."""
    with pytest.raises(ValueError, match=rf"no group over {', '.join(axes)}; list it in GROUPS of megalite.*mesh$"):
        Mesh(PaperWorld(0, 4), dp=2, cp=2).group(*axes)


@pytest.mark.parametrize("axes", [("ep",), ("dp", "dp")])
def test_axes_that_the_mesh_does_not_have(axes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"no group over {', '.join(axes)}"):
        Mesh(PaperWorld(0, 4), dp=2, cp=2).group(*axes)


def test_one_rank() -> None:
    mesh = Mesh(SoloWorld())
    groups = (mesh.world, mesh.tp, mesh.pp, mesh.dp, mesh.cp, mesh.embed, mesh.kv)
    assert {(group.ranks, group.rank) for group in groups} == {((0,), 0)}
    assert mesh.is_first_stage
    assert mesh.is_last_stage


def test_a_mesh_of_another_size_than_the_world_is_refused() -> None:
    with pytest.raises(AssertionError):
        Mesh(PaperWorld(0, 6), tp=2, pp=2)
