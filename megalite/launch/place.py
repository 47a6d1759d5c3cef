"""Where this process stands among those of the run, by its launcher's environment; asked before torch is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# step numbers above are SLURM's own: of the batch script, of salloc's shell, of what ssh starts
LAST_STEP = 0xFFFFFFF0
# where other launchers tell how many processes they have started
OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "MV2_COMM_WORLD_SIZE": "mpirun_rsh"}


@dataclass(frozen=True)
class Place:
    """`local_ranks`: ranks on this node. `master`, `port`: where ranks meet; `master` is "" where nobody told.

    `note`: what the user may have meant instead. `alone`: nobody has started the others.
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
        """The first rank of this rank's node."""
        return self.rank - self.local_rank


def place(env: Mapping[str, str] = os.environ, pid: int | None = None) -> Place:
    """By torchrun's names; else by srun's, if it started a process per rank; else one process alone.

    ValueError where the environment contradicts itself.
    """
    if "RANK" in env or _number(env, "WORLD_SIZE", 1) > 1:
        return _of_torchrun(env)
    if _tasks(env) > 1:
        return _of_srun(env, os.getpid() if pid is None else pid)
    for name, launcher in OTHERS.items():
        if _number(env, name, 1) > 1:
            raise ValueError(
                f"{launcher} has started {env[name]} processes ({name}), and ranks are numbered by torchrun or srun; "
                f"use torchrun --nproc_per_node {env[name]} or srun --ntasks {env[name]}"
            )
    tasks = _number(env, "SLURM_NTASKS", 1)
    return Place(
        note=f"note: one process, in a SLURM job of {tasks} tasks: srun python ... starts one for each task, "
        f"torchrun --nproc_per_node N ... N of them"
        if tasks > 1
        else ""
    )


def _tasks(env: Mapping[str, str]) -> int:
    """How many processes the srun that started this one has started; 1 without srun.

    SLURM_NTASKS is the job's where salloc's shell inherits it; the step's own number comes first.
    """
    if "SLURM_STEP_ID" not in env or _number(env, "SLURM_STEP_ID", 0) >= LAST_STEP:
        return 1
    return _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))


def _of_srun(env: Mapping[str, str], pid: int) -> Place:
    size = _tasks(env)
    if "SLURM_PTY_PORT" in env and _number(env, "SLURM_TASK_PID", pid) != pid:
        raise ValueError(
            f"this shell is the first of {size} tasks of an srun --pty, and the others have no shell: leave it and use "
            f"srun --ntasks {size} python ... for {size} ranks; here, torchrun --nproc_per_node N ... starts N, and "
            f"env RANK=0 WORLD_SIZE=1 python ... one"
        )
    # "8(x2)" or "8,4": every rank has to read the same number here, for the layout is chosen by it
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
            # enough for a plan; whoever starts a world asks for it (together.py)
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
    # nodes of one srun may have different numbers of ranks, of which `local_ranks` is the first node's
    most = here.world_size if rank == "SLURM_PROCID" else here.local_ranks
    if not 0 <= here.rank < here.world_size or not 0 <= here.local_rank < most:
        raise ValueError(
            f"{rank}={here.rank} of {size}={here.world_size}, local rank {here.local_rank} of {here.local_ranks}, "
            f"cannot be; start with torchrun --nproc_per_node N, or unset {rank} and {size} for one process"
        )
    if not 0 < here.port < 65536:
        raise ValueError(f"MASTER_PORT={here.port} is no port; use 1024 to 65535")
    return here


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, None if default is None else str(default))
    if text is None:
        raise ValueError(
            f"the environment has a part of what a launcher sets, and {name} is missing; start with torchrun "
            f"--nproc_per_node N, or unset RANK and WORLD_SIZE for one process"
        )
    if not re.fullmatch(r"-?[0-9]{1,18}", text.strip()):
        raise ValueError(f"{name}={text[:80]!r} in the environment is not a number; set it right, or unset it")
    return int(text)
