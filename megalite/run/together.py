"""How the ranks of one command start, fail and end together: each error is printed once, by a rank that hit it."""

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


# a rank that failed before connecting waits this long to report it to rank 0
FAILED_S = 60.0
# words in the message of a failed connection between ranks
CONNECTION = r"gloo|nccl|connection|timed? ?out|store"
# this rank's connection to rank 0, once it is open
_peers: Peers | None = None


def fail(error: object, meets: bool = True) -> int:
    """Report an error raised before the ranks have connected: printed once, by the first rank that hit it.

    `meets`: whether ranks without the error go on to connect. Returns the exit status.
    """
    text = describe_error(error)
    if RANK == 0:
        print_error(text)
    one_node = LOCAL_RANKS == WORLD_SIZE
    if WORLD_SIZE == 1 or HERE.alone or (RANK == 0 and one_node and "TORCHELASTIC_RUN_ID" in os.environ):
        return 2  # torchrun ends the other ranks on this node
    if not meets:
        time.sleep(1.0)  # let rank 0 print first
        return print_error(text) if HERE.local_rank == 0 and RANK > 0 else 2
    try:
        peers, _ = join(HERE, FAILED_S, BEGAN)
    except (ValueError, OSError, ImportError):
        return print_error(text) if RANK > 0 else 2
    settle(peers, start_report(HERE, text, printed=RANK == 0))
    peers.wait_for_end()


def require_peers() -> None:
    """Raises ConfigError if the other ranks have not been started, or the address of rank 0 is not known."""
    if HERE.alone:
        raise ConfigError(
            f"WORLD_SIZE={WORLD_SIZE} is set but RANK is not, so no launcher has started the other ranks; unset "
            f"WORLD_SIZE for one process, or use torchrun --nproc_per_node {WORLD_SIZE}"
        )
    if not HERE.master:
        raise ConfigError(
            f"srun started {WORLD_SIZE} ranks on several nodes and MASTER_ADDR is not set; before srun, run "
            f'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )


def describe_error(error: object) -> str:
    """The error as text for the user, an OSError with its file name first."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_error(text: str) -> int:
    """Print the error line, also to torchrun's error file; returns the exit status 2."""
    where = f"rank {RANK} on {socket.gethostname()}: " if RANK > 0 else ""
    sys.stdout.flush()
    line = f"error: {where}{text}"
    print(line, file=sys.stderr, flush=True)
    tell_launcher(line)
    return 2


def hear_signals() -> None:
    """Until the training loop installs its own handlers, a stop signal ends this rank and with it the run."""

    def heard(number: int, frame: FrameType | None) -> None:
        text = f"stopped by {signal.Signals(number).name} outside the training loop, with nothing to save"
        if _peers is not None:
            _peers.failed("signal", text)
        if _peers is not None or RANK == 0:
            print(f"{text}; run the same command to start again", file=sys.stderr, flush=True)
        end(128 + number)

    for number in SIGNALS:
        signal.signal(number, heard)


def in_world(
    config: Config, main: Callable[[World], None], mine: Report | None = None, run_dir: Path | None = None
) -> int:
    """Import torch, start the world and call `main` in it; returns the exit status. Every failure prints one line.

    `mine`: this rank's report, compared with the others'. `run_dir`: a folder that must be the same on all ranks.
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
    """Report the error to the other ranks, and print it if this rank is the cause; returns the exit status."""
    first = (str(error).splitlines() or [""])[0]
    kind, text, status = "error", describe_error(error), 2
    if isinstance(error, ImportError):
        text = f"{first}; python -m megalite.doctor shows what is missing"
    elif not isinstance(error, (ValueError, OSError)):
        import torch

        from megalite.config.errors import TrainingError

        if isinstance(error, torch.OutOfMemoryError):
            text, status = f"out of memory: {first}", 1
        elif isinstance(error, RuntimeError) and re.search(CONNECTION, str(error), re.IGNORECASE):
            kind, text, status = "lost", f"lost the connection to the other ranks: {first}", 1
        elif not isinstance(error, TrainingError):
            text, status = f"{type(error).__name__}: {first}", 0  # a bug: print the traceback
    if _peers is not None:
        _peers.failed(kind, text)
    if status:
        print_error(text)
    else:
        traceback.print_exception(error)
    return status or 1


def meet(config: Config) -> tuple[Peers, typing.Any]:
    """Connect to rank 0, or end the process; returns the connection, and torchrun's store if there is one."""
    try:
        return join(HERE, config.parallel.timeout_s, BEGAN)
    except NotMet as error:
        end_with(error.line, 1, error.speaks)


def complete_together(config: Config, resume: Path) -> int:
    """End a run that is already complete, after checking that all ranks agree; returns the exit status 0."""
    peers, _ = meet(config)
    settle(peers, report(config, resume, HERE))
    peers.leave()
    return 0


def leave(status: int) -> NoReturn:
    """Exit with `status`.

    With several ranks this skips the interpreter's shutdown: a thread of the communication library that frees a tensor
    then needs Python, and would abort the process.
    """
    if WORLD_SIZE > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        end(status)
    sys.exit(status)
