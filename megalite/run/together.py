"""How the ranks of one command start, fail and end together: each fault is told once, by a rank that met it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megalite.config import Config, ConfigError
from megalite.launch.launcher import end, tell_launcher, watch_launcher
from megalite.launch.meet import NotMet, join
from megalite.launch.peers import Peers, end_with
from megalite.launch.place import place
from megalite.launch.stop import SIGNALS
from megalite.run.agree import Report, report, settle, start_report

if typing.TYPE_CHECKING:
    from megalite.parallel.groups import World

BEGAN = time.monotonic()
try:
    HERE = place()
except ValueError as error:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
watch_launcher()
RANK, WORLD_SIZE, LOCAL_RANKS = HERE.rank, HERE.world_size, HERE.local_ranks


# A rank that has failed alone does not wait longer than this for another to tell.
FAILED_S = 60.0
# what an error of a connection between ranks speaks of
CONNECTION = r"gloo|nccl|connection|timed? ?out|store"
# this rank's connection to the others once they have met
_peers: Peers | None = None


def fail(error: object, meets: bool = True) -> int:
    """Tell of what went wrong before the ranks have met: once, by the first of those that have met it.

    `meets`: whether the others, if they are well, go on to meet this one.
    """
    text = describe_error(error)
    if RANK == 0:
        print_error(text)
    one_node = LOCAL_RANKS == WORLD_SIZE
    if WORLD_SIZE == 1 or HERE.alone or (RANK == 0 and one_node and "TORCHELASTIC_RUN_ID" in os.environ):
        return 2  # torchrun ends the other ranks of its node
    if not meets:
        time.sleep(1.0)  # the launcher lets the first rank speak
        return print_error(text) if HERE.local_rank == 0 and RANK > 0 else 2
    try:
        peers, _ = join(HERE, FAILED_S, BEGAN)
    except (ValueError, OSError, ImportError):
        return print_error(text) if RANK > 0 else 2
    settle(peers, start_report(HERE, text, said=RANK == 0))
    peers.wait_for_end()


def require_peers() -> None:
    """ConfigError where the other ranks cannot be met: nobody has started them, or nobody says where."""
    if HERE.alone:
        raise ConfigError(
            f"WORLD_SIZE={WORLD_SIZE} is set and RANK is not: nobody has started the other ranks; unset WORLD_SIZE for "
            f"one process, or use torchrun --nproc_per_node {WORLD_SIZE}"
        )
    if not HERE.master:
        raise ConfigError(
            f"srun started {WORLD_SIZE} ranks on several nodes and MASTER_ADDR is not set: before srun, "
            f'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )


def describe_error(error: object) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_error(text: str) -> int:
    where = f"rank {RANK} on {socket.gethostname()}: " if RANK > 0 else ""
    sys.stdout.flush()
    line = f"error: {where}{text}"
    print(line, file=sys.stderr, flush=True)
    tell_launcher(line)
    return 2


def hear_signals() -> None:
    """From here to the training loop, which saves, a signal that asks for an end ends this rank, and with it all."""

    def heard(number: int, frame: FrameType | None) -> None:
        text = f"stopped by {signal.Signals(number).name} outside the training loop: nothing was left to save"
        if _peers is not None:
            _peers.failed("signal", text)
        if _peers is not None or RANK == 0:
            print(f"{text}; the same command starts again", file=sys.stderr, flush=True)
        end(128 + number)

    for number in SIGNALS:
        signal.signal(number, heard)


def in_world(
    config: Config, main: Callable[[World], None], mine: Report | None = None, run_dir: Path | None = None
) -> int:
    """Import torch, start the world, call `main` in it; gives the exit status, every failure told in one line.

    `mine`: what this rank reports to the others. `run_dir`: a folder that has to be the same for all.
    """
    global _peers
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    store = None
    try:
        require_peers()
        if WORLD_SIZE > 1:
            _peers, store = meet(config)
            settle(_peers, mine or start_report(HERE), run_dir)
        from megalite.run.world import environment, start_world

        if _peers is not None:
            settle(_peers, start_report(HERE) | {"facts": environment(config)})
        with start_world(config, _peers, store) as world:
            main(world)
    except Exception as error:
        return failed_in_world(error)
    finally:
        _peers = None
    return 0


def failed_in_world(error: Exception) -> int:
    """Tell the other ranks, and if this one is the cause the user; gives the exit status."""
    first = (str(error).splitlines() or [""])[0]
    kind, text, status = "error", describe_error(error), 2
    if isinstance(error, ImportError):
        text = f"{first}; python -m megalite.doctor says what is missing"
    elif not isinstance(error, (ValueError, OSError)):
        import torch

        from megalite.config.errors import TrainingError

        if isinstance(error, torch.OutOfMemoryError):
            text, status = f"out of memory: {first}", 1
        elif isinstance(error, RuntimeError) and re.search(CONNECTION, str(error), re.IGNORECASE):
            kind, text, status = "lost", f"lost the others: {first}", 1
        elif not isinstance(error, TrainingError):
            text, status = f"{type(error).__name__}: {first}", 0  # a fault of ours: its traceback is wanted
    if _peers is not None:
        _peers.failed(kind, text)
    if status:
        print_error(text)
    else:
        traceback.print_exception(error)
    return status or 1


def meet(config: Config) -> tuple[Peers, typing.Any]:
    """This rank's connection to the others, and the store of torchrun's agent if there is one."""
    try:
        return join(HERE, config.parallel.timeout_s, BEGAN)
    except NotMet as error:
        end_with(error.line, 1, error.speaks)


def complete_together(config: Config, resume: Path) -> int:
    """End a run that has nothing left to do, if every rank sees it so."""
    peers, _ = meet(config)
    settle(peers, report(config, resume, HERE))
    peers.leave()
    return 0


def leave(status: int) -> NoReturn:
    """End this process with `status`.

    A rank does not wait for the interpreter to be taken down: threads of the communication library may still let go of
    a tensor, need Python for it, and would abort the process at its very end.
    """
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        end(status)
    sys.exit(status)
