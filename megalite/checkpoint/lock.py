"""One run at a time in a run folder: the file LOCK names the process that uses it. No torch here.

The file is created with its content in one atomic step, which works on network file systems, where locks of the
operating system may not reach other nodes. The lock is valid while its process lives. On the same machine that is
checked; on another machine it cannot be, so the message tells the user where to look. An earlier attempt of the same
job counts as ended.
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

NAME, TEMPORARY = "LOCK", ".LOCK-"


@dataclass(frozen=True)
class Owner:
    """The process that uses a run folder.

    `machine`: its boot id and PID namespace. `started`: clock ticks from boot to its start, as in /proc. `jobs`: ids
    that its launchers give to all attempts of the same job.
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
    """Lock an existing run folder until `release` or the end of this process. Raises ConfigError as `require_free`."""
    path, content = run_dir / NAME, json.dumps(dataclasses.asdict(_this_process()), indent=1)
    taken = False
    while not taken and not _create(path, content):
        with _examining(path) as unchanged:
            if unchanged:
                require_free(run_dir)
                _write_temporary(path, content).replace(path)  # its run is dead
                taken = True
    launcher.held = path


def release(run_dir: Path) -> None:
    """Unlock a run folder, if this process holds it."""
    path, me = run_dir / NAME, _this_process()
    with contextlib.suppress(OSError, ValueError):
        owner = _read(path)
        if owner is not None and (owner.machine, owner.pid, owner.started) == (me.machine, me.pid, me.started):
            path.unlink()
    launcher.held = None


def require_free(run_dir: Path) -> None:
    """Raise ConfigError, with a remedy, if another run uses `run_dir` or may be using it."""
    owner, me = _read(run_dir / NAME), _this_process()
    if owner is None or (owner.machine != me.machine and set(owner.jobs) & set(me.jobs)):
        return
    if owner.machine == me.machine:
        if _start_of(owner.pid) == owner.started:
            raise ConfigError(
                f"{run_dir} is in use by {owner}; wait for it to end (`touch {run_dir / 'STOP'}` asks a run to), or "
                f"use another folder"
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
        f"{run_dir} is locked by {owner}; whether that still runs cannot be seen from {me.host}, and {sign}. Check "
        f"with `{look}`: if it is gone, delete {run_dir / NAME} and start again"
    )


def jobs_of(env: Mapping[str, str] = os.environ) -> list[str]:
    """Ids of the job that this process belongs to, shared by all its attempts and by no other job."""
    slurm, elastic = env.get("SLURM_JOB_ID"), env.get("TORCHELASTIC_RUN_ID", "none")
    return [f"SLURM job {slurm}"] * bool(slurm) + [f"torchrun {elastic}"] * (elastic != "none")


def _this_process() -> Owner:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = socket.gethostname()
    command, pid = Path(sys.argv[0]).name or "python", os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Owner(command, socket.gethostname(), machine, pid, _start_of(pid), since, jobs_of())


def _start_of(pid: int) -> int:
    """When a process of this machine started, in ticks since boot; -1 if there is no such process or it has ended."""
    try:
        # the process name, in parentheses, may contain anything
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in ("Z", "X") else int(fields[19])


def _read(path: Path) -> Owner | None:
    """The owner named by a lock; None if there is no lock. Raises ConfigError if the file cannot be understood."""
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
        time.sleep(0.1 if attempt < 9 else 0.0)  # another process may be writing it
    raise ConfigError(f"{path} does not name the run that uses the folder; if no run does, delete it and start again")


_TYPES = {"command": str, "host": str, "machine": str, "pid": int, "started": int, "since": str, "jobs": list}


def _create(path: Path, content: str) -> bool:
    """Create the lock file with its content. Returns False if it exists already."""
    temporary = _write_temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write_temporary(path: Path, content: str) -> Path:
    temporary = path.with_name(f"{TEMPORARY}{socket.gethostname()}-{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    return temporary


@contextlib.contextmanager
def _examining(path: Path) -> Iterator[bool]:
    """Keep other processes of this machine from examining the same lock file. Yields False if it has been replaced."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks: two simultaneous starts may both succeed
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            same = False
        yield same
    finally:
        os.close(descriptor)
