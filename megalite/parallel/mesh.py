"""Where a rank stands: the ranks of a run as one array over the axes (pp, dp, cp, tp), tp innermost.

Neighbouring ranks share a node, so the axis that talks most, tp, is innermost (Narayanan et al. 2021, section 3). Each
group is a slice of that one array.
"""

from __future__ import annotations

import numpy as np

from megalite.parallel.groups import Group, World

AXES = ("pp", "dp", "cp", "tp")


class Mesh:
    """The groups of one rank.

    `mesh.tp.rank` and `mesh.tp.size` are the coordinate and the extent on the tp axis; likewise pp, dp, cp.
    `embed` joins the first and the last pipeline stage (tied embeddings); `kv` joins the tp ranks that hold replicas of
    one kv group: `kv_replicas` neighbours when tp is `kv_replicas` times the number of kv heads.
    """

    def __init__(
        self, world: World, *, tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, kv_replicas: int = 1
    ) -> None:
        assert pp * dp * cp * tp == world.size, (pp, dp, cp, tp, world.size)
        self.link = world
        self.device = world.device
        grid = np.arange(world.size).reshape(pp, dp, cp, tp)
        self.world = world.split([list(range(world.size))])
        self.pp, self.dp, self.cp, self.tp = (
            world.split(np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis]).tolist()) for axis in range(4)
        )
        self.embed: Group = Group([world.rank], 0)
        if pp > 1:
            ends = np.moveaxis(grid[[0, -1]], 0, -1).reshape(-1, 2).tolist()
            middle = [[rank] for rank in grid[1:-1].reshape(-1).tolist()]
            self.embed = world.split(ends + middle)
        self.kv: Group = Group([world.rank], 0)
        if kv_replicas > 1:
            self.kv = world.split(grid.reshape(-1, kv_replicas).tolist())

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1
