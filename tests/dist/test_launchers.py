"""A launcher that dies, is signalled or leaves ranks at a port of another program: every rank ends, and soon."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ranks import COMMON, REPOSITORY, Ranks, different, pretrain, run_ranks, whole_tensors
from test_ranks import running
from test_stop import wait_for_step
from test_torchrun import children

from megalite.checkpoint.folder import complete

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


@contextmanager
def launched(tmp_path: Path, argv: list[str], *options: str) -> Iterator[subprocess.Popen]:
    """torchrun of two ranks, its output in a file; none of it outlives the block."""
    command = [*TORCHRUN, *options, str(REPOSITORY / "examples" / "pretrain_7b.py"), "--preset", "tiny", *argv]
    environment = {**os.environ, **COMMON, "TMPDIR": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True)
        try:
            yield agent
        finally:
            for pid in session(agent.pid):
                os.kill(pid, signal.SIGKILL)
            agent.wait()


def session(leader: int) -> list[int]:
    """The living processes of a session, orphans among them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def all_end(agent: subprocess.Popen, pids: list[int], seconds: float) -> float:
    """Wait until no process is left; how long it took."""
    began = time.monotonic()
    agent.poll()
    while left := [pid for pid in {*pids, *session(agent.pid)} if running(pid)]:
        assert time.monotonic() - began < seconds, f"{left} still run after {seconds} s"
        time.sleep(0.02)
        agent.poll()
    return time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_ranks_without_their_launcher_save_and_end(settings, tmp_path: Path, number: signal.Signals) -> None:
    """SIGUSR1 kills a plain torchrun."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, "parallel.pp=2", "train.steps=1000000", "optim.decay_samples=96")
    with launched(tmp_path, argv) as agent:
        wait_for_step(run_dir, 3, 120)
        pids = children(agent.pid)
        agent.send_signal(number)
        all_end(agent, pids, 10)
    log = (tmp_path / "log").read_text()
    (saved,) = complete(run_dir)
    step = int(saved.name[5:])
    assert f"stopped at step {step}: the launcher is gone" in log
    assert "Traceback" not in log

    run_ranks(2, pretrain, [*argv, f"train.steps={step + 2}"])
    straight = tmp_path / "straight"
    run_ranks(2, pretrain, [*argv, f"train.steps={step + 2}", f"train.run_dir={straight}"])
    assert different(whole_tensors(complete(run_dir)[-1]), whole_tensors(complete(straight)[-1])) == []


def test_torchrun_passes_sigusr1_on_if_told(settings, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = settings(run_dir, "parallel.pp=2", "train.steps=1000000", "optim.decay_samples=96")
    with launched(tmp_path, argv, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1") as agent:
        wait_for_step(run_dir, 3, 120)
        pids = children(agent.pid)
        agent.send_signal(signal.SIGUSR1)
        all_end(agent, pids, 30)
    (saved,) = complete(run_dir)
    assert f"stopped at step {int(saved.name[5:])}: SIGUSR1" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("after_s", [0.0, 1.5])
def test_a_launcher_that_ends_while_ranks_start(
    settings, tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    run_dir = tmp_path / "run"
    with launched(tmp_path, settings(run_dir, "parallel.pp=2", "train.steps=1000000")) as agent:
        deadline = time.monotonic() + 60
        while len(pids := children(agent.pid)) < 2:
            assert time.monotonic() < deadline, "torchrun starts no ranks"
            time.sleep(0.01)
        time.sleep(after_s)
        agent.send_signal(number)
        all_end(agent, pids, 40)


def test_the_port_is_another_programs(settings, tmp_path: Path) -> None:
    """As under srun: rank 0 names port, holder and remedy; the other rank does not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        began = time.monotonic()
        more = {"MASTER_PORT": str(port)}
        with Ranks(2, pretrain, settings(tmp_path), served=False, nodes=2, more=more) as ranks:
            ended = ranks.wait(60)
        assert time.monotonic() - began < 40
    assert ended.codes == [2, 1], ended
    (line,) = ended.err[0].splitlines()
    assert line.startswith(
        f"error: rank 0 cannot listen at MASTER_PORT={port} on {socket.gethostname()}: Address already"
    )
    assert f"(held by pid {os.getpid()}, " in line
    assert line.endswith("export MASTER_PORT=N with a free port N")
    (line,) = ended.err[1].splitlines()
    assert line.startswith(f"error: rank 1 on {socket.gethostname()}: the process at 127.0.0.1:{port} is not rank 0")
    assert "export MASTER_PORT=N" in line


def test_nobody_comes(settings, tmp_path: Path) -> None:
    """A rank whose peer was never started names it."""
    with Ranks(2, pretrain, settings(tmp_path, "parallel.timeout_s=4"), served=False) as ranks:
        ranks.send(signal.SIGKILL, 1)
        began = time.monotonic()
        ended = ranks.wait(30)
        assert time.monotonic() - began < 4 + 2
    assert ended.codes == [1, -9], ended
    (line,) = ended.err[0].splitlines()
    assert line.startswith("error: rank 1 of 2 not ready after parallel.timeout_s=4 s: ")
