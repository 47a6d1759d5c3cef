"""A terminal that is closed costs nothing: the run hears of it, saves, and does not mind that nobody reads it."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import COMMON, REPOSITORY

from megalite.checkpoint.folder import complete
from megalite.watch.metrics import read_metrics


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_closed_terminal(settings, tmp_path: Path, ranks: int) -> None:
    """Alone and under torchrun, which passes the signal on."""
    run_dir, (ours, theirs) = tmp_path / "run", pty.openpty()
    argv = settings(run_dir, "train.steps=1000000", "log.interval=1")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    torchrun += ["--local_addr", "127.0.0.1"] if ranks else []
    command = [sys.executable, *torchrun, str(REPOSITORY / "examples" / "pretrain_7b.py"), "--preset", "tiny", *argv]
    code = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-c", code, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **COMMON},
        cwd=tmp_path,
    )
    os.close(theirs)
    shown = b""
    try:
        deadline = time.monotonic() + 120
        while b"step " not in shown or len(read_metrics(run_dir).get("train", [])) < 3:
            shown += os.read(ours, 4096)
            assert time.monotonic() < deadline, shown
        before = len(read_metrics(run_dir)["train"])
        os.close(ours)
        while not complete(run_dir) or (run_dir / "LOCK").exists():
            assert time.monotonic() < deadline, read_metrics(run_dir)["train"][-1]
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    rows = read_metrics(run_dir)
    assert len(rows["train"]) < before + 200
    assert rows["end"][-1]["at_step"] == rows["train"][-1]["step"]
    assert complete(run_dir)[-1].name == f"step-{rows['train'][-1]['step']:08d}"


def test_a_reader_that_leaves(settings, tmp_path: Path) -> None:
    """As the end of a pipe in a closed terminal: the run goes on to its end."""
    command = [sys.executable, str(REPOSITORY / "examples" / "pretrain_7b.py"), "--preset", "tiny"]
    argv = settings(tmp_path / "run", "train.steps=20", "log.interval=1")
    with subprocess.Popen([*command, *argv], stdout=subprocess.PIPE, env={**os.environ, **COMMON}) as process:
        assert process.stdout
        while not process.stdout.readline().startswith(b"step "):
            pass
        process.stdout.close()
        assert process.wait(120) == 0
    assert len(read_metrics(tmp_path / "run")["train"]) == 20
    assert complete(tmp_path / "run")
