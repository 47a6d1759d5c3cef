"""One run at a time in a run folder: the file LOCK says which run of which machine has it. No torch here.

The file is made with its content in one step, which every file system does for one process only, where locks of the
operating system are not known to all nodes. It holds as long as the process lives: on the same machine that can be
seen. Of another machine it cannot, so nothing is guessed: the user is told where to look. An earlier attempt of the
same job is over when the next one starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megalite.config import ConfigError
from megalite.launch import launcher
from megalite.watch.progress import duration

NAME, BESIDE = "LOCK", ".LOCK-"


@dataclass(frozen=True)
class Owner:
    """The process that has a run folder. `machine`: its boot and process space. `started`: as /proc counts, from boot.

    `jobs`: what its launchers call all attempts of the job that it belongs to.
    """

    command: str
    host: str
    machine: str
    pid: int
    started: int
    since: str
    jobs: list[str]

    def __str__(self) -> str:
        job = "".join(f", {job}" for job in self.jobs)
        return f"{self.command} on {self.host} (process {self.pid}, since {self.since}{job})"


def hold(run_dir: Path) -> None:
    """Take a run folder that is there, until `release` or the end of this process.

    ConfigError where a run has it, or may have it.
    """
    path, content = run_dir / NAME, json.dumps(dataclasses.asdict(_me()), indent=1)
    taken = False
    while not taken and not _create(path, content):
        with _alone(path) as unchanged:
            if unchanged:
                require_free(run_dir)
                _write_beside(path, content).replace(path)  # of a run that is dead
                taken = True
    launcher.held = path


def release(run_dir: Path) -> None:
    """Give a run folder back, if this process has it."""
    path, me = run_dir / NAME, _me()
    with contextlib.suppress(OSError, ValueError):
        owner = _read(path)
        if owner is not None and (owner.machine, owner.pid, owner.started) == (me.machine, me.pid, me.started):
            path.unlink()
    launcher.held = None


def require_free(run_dir: Path) -> None:
    """ConfigError where a run has `run_dir`, or may have it, with what to do."""
    owner, me = _read(run_dir / NAME), _me()
    if owner is None or (owner.machine != me.machine and set(owner.jobs) & set(me.jobs)):
        return
    if owner.machine == me.machine:
        if _start_of(owner.pid) == owner.started:
            raise ConfigError(
                f"{run_dir} is in use by {owner}; wait for it to end (`touch {run_dir / 'STOP'}` asks a run to), or "
                f"take another folder"
            )
        return
    try:
        written = time.time() - (run_dir / "metrics.jsonl").stat().st_mtime
        sign = f"metrics.jsonl was last written {duration(max(0.0, written))} ago"
    except OSError:
        sign = "it has written no metrics.jsonl"
    slurm = [job.removeprefix("SLURM job ") for job in owner.jobs if job.startswith("SLURM job ")]
    look = f"squeue -j {slurm[0]}" if slurm else f"ssh {owner.host} ps -fp {owner.pid}"
    raise ConfigError(
        f"{run_dir} is locked by {owner}; whether that still runs cannot be seen from {me.host}, and {sign}. Look with "
        f"`{look}`: if it is gone, delete {run_dir / NAME} and start again"
    )


def jobs_of(env: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the job that this process belongs to, which all its attempts have and no other run has."""
    slurm, elastic = env.get("SLURM_JOB_ID"), env.get("TORCHELASTIC_RUN_ID", "none")
    return [f"SLURM job {slurm}"] * bool(slurm) + [f"torchrun {elastic}"] * (elastic != "none")


def _me() -> Owner:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = socket.gethostname()
    command, pid = Path(sys.argv[0]).name or "python", os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Owner(command, socket.gethostname(), machine, pid, _start_of(pid), since, jobs_of())


def _start_of(pid: int) -> int:
    """When a process of this machine was started, in ticks since boot; -1 if it is none, or one that has ended."""
    try:
        # the name, in parentheses, may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in ("Z", "X") else int(fields[19])


def _read(path: Path) -> Owner | None:
    """Who has the lock; None if there is none. ConfigError where that cannot be said."""
    for attempt in range(10):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            owner = Owner(**json.loads(text))
            if all(isinstance(getattr(owner, name), kind) for name, kind in _TYPES.items()):
                return owner
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError, RecursionError):
            pass
        time.sleep(0.1 if attempt < 9 else 0.0)  # it may be on its way to the disk
    raise ConfigError(f"{path} does not say which run has the folder; if none has, delete it and start again")


_TYPES = {"command": str, "host": str, "machine": str, "pid": int, "started": int, "since": str, "jobs": list}


def _create(path: Path, content: str) -> bool:
    """Make the lock's file with its content, unless it is there."""
    beside = _write_beside(path, content)
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        beside.unlink(missing_ok=True)
    return True


def _write_beside(path: Path, content: str) -> Path:
    beside = path.with_name(f"{BESIDE}{socket.gethostname()}-{os.getpid()}")
    beside.write_text(content, encoding="utf-8")
    return beside


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """While no other start on this machine looks at the lock that is there; false where it is no longer the same."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: two starts at one moment are not told apart
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            same = False
        yield same
    finally:
        os.close(descriptor)
