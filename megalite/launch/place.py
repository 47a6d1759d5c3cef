"""This process's rank, world size and meeting point, from the launcher's environment. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# larger step numbers are SLURM's own: the batch script, salloc's shell, ssh sessions
LAST_STEP = 0xFFFFFFF0
# variables in which other launchers give their number of processes
OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "MV2_COMM_WORLD_SIZE": "mpirun_rsh"}


@dataclass(frozen=True)
class Place:
    """One process of a run.

    `local_ranks`: ranks on this node. `master`, `port`: where ranks connect; `master` is "" if it is unknown. `note`:
    a hint for the user. `alone`: WORLD_SIZE is set without RANK, so the other ranks have not been started.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    master: str = "127.0.0.1"
    port: int = 29500
    note: str = field(default="", compare=False)
    alone: bool = field(default=False, compare=False)

    @property
    def node(self) -> int:
        """The first rank on this rank's node."""
        return self.rank - self.local_rank


def place(env: Mapping[str, str] = os.environ, pid: int | None = None) -> Place:
    """Read torchrun's variables, else srun's if it started one process per rank, else return a single process.

    Raises ValueError if the environment contradicts itself.
    """
    if "RANK" in env or _number(env, "WORLD_SIZE", 1) > 1:
        return _of_torchrun(env)
    if _tasks(env) > 1:
        return _of_srun(env, os.getpid() if pid is None else pid)
    for name, launcher in OTHERS.items():
        if _number(env, name, 1) > 1:
            raise ValueError(
                f"{launcher} started {env[name]} processes ({name}), but only torchrun and srun are supported; use "
                f"torchrun --nproc_per_node {env[name]} or srun --ntasks {env[name]}"
            )
    tasks = _number(env, "SLURM_NTASKS", 1)
    return Place(
        note=f"note: this is one process in a SLURM job of {tasks} tasks; srun python ... starts one per task, "
        f"torchrun --nproc_per_node N ... starts N"
        if tasks > 1
        else ""
    )


def _tasks(env: Mapping[str, str]) -> int:
    """The number of processes in this srun step; 1 without srun.

    The step's own number comes first: in salloc's shell, SLURM_NTASKS is the job's.
    """
    if "SLURM_STEP_ID" not in env or _number(env, "SLURM_STEP_ID", 0) >= LAST_STEP:
        return 1
    return _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))


def _of_srun(env: Mapping[str, str], pid: int) -> Place:
    size = _tasks(env)
    if "SLURM_PTY_PORT" in env and _number(env, "SLURM_TASK_PID", pid) != pid:
        raise ValueError(
            f"this shell is the first of {size} tasks of srun --pty, and the other tasks have no shell; leave it and "
            f"use srun --ntasks {size} python ... for {size} ranks, or here torchrun --nproc_per_node N ... for N, or "
            f"env RANK=0 WORLD_SIZE=1 python ... for one"
        )
    # "8(x2)" or "8,4": every rank must read the same number here, because it decides the topology
    first = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_ranks = int(first[0]) if first else size
    return _checked(
        Place(
            _number(env, "SLURM_PROCID"),
            size,
            _number(env, "SLURM_LOCALID"),
            local_ranks,
            env.get("MASTER_ADDR", "127.0.0.1" if local_ranks == size else ""),
            # jobs that share a node must not meet at one port
            _number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000),
        ),
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
    )


def _of_torchrun(env: Mapping[str, str]) -> Place:
    size = _number(env, "WORLD_SIZE")
    return _checked(
        Place(
            # 0 is enough to plan; together.require_peers refuses to start without RANK
            _number(env, "RANK", 0),
            size,
            _number(env, "LOCAL_RANK", 0),
            _number(env, "LOCAL_WORLD_SIZE", size),
            env.get("MASTER_ADDR", "127.0.0.1"),
            _number(env, "MASTER_PORT", 29500),
            alone="RANK" not in env,
        ),
        "RANK",
        "WORLD_SIZE",
    )


def _checked(here: Place, rank: str, size: str) -> Place:
    # under srun nodes may have different numbers of ranks, and `local_ranks` is the first node's
    most = here.world_size if rank == "SLURM_PROCID" else here.local_ranks
    if not 0 <= here.rank < here.world_size or not 0 <= here.local_rank < most:
        raise ValueError(
            f"{rank}={here.rank} of {size}={here.world_size}, local rank {here.local_rank} of {here.local_ranks}: "
            f"out of range; start with torchrun --nproc_per_node N, or unset {rank} and {size} for one process"
        )
    if not 0 < here.port < 65536:
        raise ValueError(f"MASTER_PORT={here.port} is not a valid port; use 1024 to 65535")
    return here


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, None if default is None else str(default))
    if text is None:
        raise ValueError(
            f"{name} is not set in the environment, but other variables of a launcher are; start with torchrun "
            f"--nproc_per_node N, or unset RANK and WORLD_SIZE for one process"
        )
    if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
        raise ValueError(f"{name}={text[:80]!r} in the environment is not a number; correct it or unset it")
    return int(text)
