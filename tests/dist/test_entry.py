"""The entry as users start it: through torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import COMMON, REPOSITORY

from megalite.checkpoint.folder import complete

SCRIPT = str(REPOSITORY / "examples" / "pretrain_7b.py")
Result = subprocess.CompletedProcess[str]


def torchrun(ranks: int, *argv: str) -> Result:
    """Start the script on so many ranks; nothing of it outlives this call."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", SCRIPT, *argv]
    process = subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | COMMON,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        orphans = alive(process.pid)
        if orphans:
            os.killpg(process.pid, signal.SIGKILL)
    assert not orphans, f"processes were left behind\n{out}{err}"
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def alive(session: int) -> bool:
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def test_eight_ranks_learn_from_the_corpus(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = torchrun(
        8,
        *("--preset", "tiny", "train.steps=3", "log.interval=1", "train.eval_samples=8", "train.device=cpu"),
        *(f"train.run_dir={run_dir}", f"data.cache_dir={tmp_path / 'cache'}"),
    )
    assert result.returncode == 0, result
    assert "tp 2 x pp 2 x dp 2 on 8 ranks" in result.stdout
    # rank 0 alone speaks
    assert re.findall(r"^step (\d)/3  loss \d", result.stdout, re.M) == ["1", "2", "3"]
    assert len(re.findall(r"^step 3/3  held out (?:en|zh): ", result.stdout, re.M)) == 2
    (folder,) = complete(run_dir)
    # the replicas' ranks 2, 3, 6 and 7 have nothing of their own to save
    assert sorted(os.listdir(folder)) == [
        "manifest.json",
        *(f"rank-0000{rank}-000.safetensors" for rank in (0, 1, 4, 5)),
    ]
    assert json.loads((folder / "manifest.json").read_text())["step"] == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("train.step=3", "unknown key train.step; did you mean train.steps?"),
        ("parallel.dp=4", "pp 1 x dp 4 x cp 1 x tp 1 = 4 ranks, but the world size is 2; use parallel.dp=2"),
    ],
)
def test_a_mistake_is_told_once(tmp_path: Path, argument: str, message: str) -> None:
    result = torchrun(2, "--preset", "tiny", f"train.run_dir={tmp_path / 'run'}", argument)
    assert result.returncode != 0
    told = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error:")]
    assert len(told) == 1, result
    assert message in told[0]
    # torchrun's report, forty lines, closes with it
    assert result.stderr.splitlines()[-2].strip() == f"traceback : {told[0]}"
    assert not (tmp_path / "run").exists()
