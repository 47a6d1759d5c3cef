"""torchrun itself: agents of one node or two, and a rank that is killed and started anew."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import COMMON, REPOSITORY, different, pretrain, run_ranks, whole_tensors

from megalite.checkpoint.folder import complete
from megalite.watch.metrics import read_metrics

STEPS = 40


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lines(run_dir: Path, kind: str) -> list[dict]:
    return read_metrics(run_dir).get(kind, [])


@pytest.mark.parametrize(("nodes", "local_ranks"), [(1, 2), (2, 1)])
def test_a_killed_rank_starts_anew_from_the_last_checkpoint(
    settings, tmp_path: Path, nodes: int, local_ranks: int
) -> None:
    run_dir, straight = tmp_path / "run", tmp_path / "straight"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc_per_node", local_ranks),
        *("--max_restarts", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"),
        *("--local_addr", "127.0.0.1", REPOSITORY / "examples" / "pretrain_7b.py"),
    ]
    argv = settings(run_dir, "parallel.pp=2", f"train.steps={STEPS}", "checkpoint.interval=5", "log.interval=1")
    # as docs/slurm.md says: one agent keeps its store over restarts, several make a new one each time
    several = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if nodes > 1 else {}
    environment = {**os.environ, **COMMON, **several, "TMPDIR": str(tmp_path)}
    log = (tmp_path / "log").open("w+")
    agents = [
        subprocess.Popen(
            [*map(str, torchrun), "--preset", "tiny", *argv], env=environment, stdout=log, stderr=log, cwd=tmp_path
        )
        for _ in range(nodes)
    ]
    try:
        deadline = time.monotonic() + 120
        while not complete(run_dir):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        victim = children(agents[0].pid)[0]
        os.kill(victim, signal.SIGKILL)
        codes = [agent.wait(120) for agent in agents]
    finally:
        for agent in agents:
            # not SIGKILL, of which its ranks would not learn
            agent.terminate()
            agent.wait(60)
        log.close()
    assert codes == [0] * nodes, (tmp_path / "log").read_text()

    first, second = (row["at_step"] for row in lines(run_dir, "start"))
    assert first == 0
    assert second >= 5
    assert second % 5 == 0
    run_ranks(1, pretrain, settings(straight, f"train.steps={STEPS}"))
    assert [row["loss"] for row in lines(run_dir, "train")] == [row["loss"] for row in lines(straight, "train")]
    assert different(whole_tensors(complete(run_dir)[-1]), whole_tensors(complete(straight)[-1])) == []
