"""The ranks of a run as one array over the axes (pp, dp, cp, tp), and the groups that are slices of it.

tp varies fastest: it communicates most, and neighbouring ranks share a node (Narayanan et al. 2021, section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from megalite.parallel.groups import Group, World

AXES = ("pp", "dp", "cp", "tp")

# Every mesh creates the groups over these axes, in this order. torch.distributed needs all ranks to create all groups
# in one order, which a group that is created where it is first used cannot promise.
GROUPS = (AXES, ("pp",), ("dp",), ("cp",), ("tp",), ("dp", "cp"))


def slices(shape: Sequence[int], axes: Collection[str]) -> list[list[int]]:
    """Split the ranks of a mesh of `shape` (pp, dp, cp, tp) into lists that differ in the coordinates of `axes` alone.

    Ranks of a list are in ascending order; lists are ordered by the coordinates they share.
    """
    kept = [number for number, axis in enumerate(AXES) if axis not in axes]
    varied = [number for number, axis in enumerate(AXES) if axis in axes]
    size = int(np.prod([shape[number] for number in varied], dtype=int))
    grid = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    found: list[list[int]] = grid.transpose(*kept, *varied).reshape(-1, size).tolist()
    return found


class Mesh:
    """The groups of one rank.

    `mesh.tp.rank` and `mesh.tp.size` are this rank's coordinate on the tp axis and the size of that axis; likewise pp,
    dp, cp. `mesh.group("dp", "cp")` is the group over two axes together: the ranks that hold the same parameters.
    `embed` joins the first and the last pipeline stage (tied embeddings). `kv` joins the tp ranks that hold the same
    key and value heads: `kv_replicas` neighbours if tp is `kv_replicas` times the number of kv heads.
    """

    def __init__(
        self, world: World, *, tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, kv_replicas: int = 1
    ) -> None:
        shape = (pp, dp, cp, tp)
        assert pp * dp * cp * tp == world.size, (*shape, world.size)
        self.link = world
        self.device = world.device
        self._groups = {axes: world.split(slices(shape, axes)) for axes in GROUPS}
        self.world = self.group(*AXES)
        self.pp, self.dp, self.cp, self.tp = (self.group(axis) for axis in AXES)
        self.embed: Group = Group([world.rank], 0)
        if pp > 1:
            pipelines = slices(shape, ("pp",))
            ends = [[ranks[0], ranks[-1]] for ranks in pipelines]
            self.embed = world.split(ends + [[rank] for ranks in pipelines for rank in ranks[1:-1]])
        self.kv: Group = Group([world.rank], 0)
        if kv_replicas > 1:
            self.kv = world.split(np.arange(world.size).reshape(-1, kv_replicas).tolist())

    def group(self, *axes: str) -> Group:
        """The ranks that differ from this one in the coordinates of `axes` alone, in any order of `axes`.

        Raises ValueError for axes that GROUPS does not list.
        """
        ordered = tuple(axis for axis in AXES if axis in axes)
        if len(ordered) != len(axes) or ordered not in self._groups:
            raise ValueError(f"the mesh has no group over {', '.join(axes)}; list it in GROUPS of {__name__}")
        return self._groups[ordered]

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1
