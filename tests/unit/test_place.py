"""Each launcher's environment, and what place() makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megalite import place as module
from megalite.place import Place, place, tell_launcher

# as srun sets them for the last of eight processes on two nodes
SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


def test_no_launcher() -> None:
    assert place({}) == Place(0, 1, 0, 1, "127.0.0.1", 29500)


def test_torchrun() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place({**env, "MASTER_ADDR": "node1", "MASTER_PORT": "1234"}) == Place(5, 8, 1, 4, "node1", 1234)


def test_srun_with_a_process_per_rank() -> None:
    assert place({**SRUN, "MASTER_ADDR": "node1"}) == Place(7, 8, 3, 4, "node1", 21234)
    assert place({**SRUN, "MASTER_ADDR": "node1", "MASTER_PORT": "29501"}).port == 29501


def test_srun_on_several_nodes_has_to_be_told_where_to_meet() -> None:
    assert place(SRUN).master == ""
    assert place({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8"}).master == "127.0.0.1"


def test_nodes_with_different_numbers_of_ranks_give_every_rank_the_same_answer() -> None:
    assert place({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "5,3", "MASTER_ADDR": "node1"}).local_ranks == 5


def test_torchrun_within_a_job_goes_by_torchrun() -> None:
    env = {**SRUN, "SLURM_NTASKS": "2", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place({**env, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) == Place(3, 4, 1, 2, "node1", 29500)


def test_a_plain_command_in_a_job_is_one_process() -> None:
    batch_script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert place(batch_script) == place({**SRUN, "SLURM_NTASKS": "1"}) == Place()


# a rank's launcher dies at once; the rank sleeps in a C call meanwhile
ORPHAN = """
import ctypes, os, sys, time
if os.fork():
    time.sleep(1)
    os._exit(0)
from megalite import place
place.watch_launcher({"WORLD_SIZE": sys.argv[1]})
place.training = sys.argv[2] == "True"
print("started", flush=True)
ctypes.CDLL(None).sleep(5)
print("gone" if place.launcher_gone() else "here", flush=True)
"""


def orphan(ranks: int, training: bool) -> str:
    command = [sys.executable, "-c", ORPHAN, str(ranks), str(training)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60).stdout


def test_a_rank_ends_with_its_launcher_unless_it_trains() -> None:
    assert orphan(2, training=False) == "started\n"
    assert orphan(2, training=True) == "started\ngone\n"


def test_a_process_alone_may_outlive_its_shell() -> None:
    assert orphan(1, training=False) == "started\nhere\n"
    assert not module.launcher_gone()


def test_the_last_line_is_left_for_the_launcher(tmp_path: Path) -> None:
    tell_launcher("error: nobody asks", {})
    tell_launcher("error: nowhere", {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "lost" / "error.json")})
    path = tmp_path / "error.json"
    tell_launcher("error: seq_len é", {"TORCHELASTIC_ERROR_FILE": str(path)})
    assert json.loads(path.read_text(encoding="utf-8"))["message"] == "error: seq_len é"
