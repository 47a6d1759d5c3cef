"""Each launcher's environment, and what place() makes of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megalite.launch.place import Place, place

PRETRAIN = Path(__file__).resolve().parents[3] / "examples" / "pretrain_7b.py"

# as srun sets them for the last of eight processes on two nodes
SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
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


def test_srun_on_several_nodes_needs_an_address() -> None:
    assert place(SRUN).master == ""
    assert place({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8"}).master == "127.0.0.1"


def test_nodes_with_different_numbers_of_ranks_give_every_rank_the_same_answer() -> None:
    assert place({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "5,3", "MASTER_ADDR": "node1"}).local_ranks == 5
    last = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,5", "SLURM_LOCALID": "4", "MASTER_ADDR": "node1"}
    assert (place(last).local_ranks, place(last).local_rank) == (3, 4)


def test_torchrun_within_a_job_goes_by_torchrun() -> None:
    env = {**SRUN, "SLURM_NTASKS": "2", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place({**env, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) == Place(3, 4, 1, 2, "node1", 29500)


# the same of Slurm 22.05 in a shell: `salloc -n 4` with LaunchParameters=use_interactive_step
SALLOC_STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEPID": "4294967290",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_PTY_PORT": "44947",
    "SLURM_TASK_PID": "29",
}
# `salloc -n 4` without it, and its commands; `sbatch -n 4`
SALLOC = {"SLURM_JOB_ID": "4", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "4"}
SBATCH = {**SALLOC, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASK_PID": "509"}
# `srun -n 4 --pty bash`
PTY = {**SALLOC_STEP, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}


@pytest.mark.parametrize("env", [SALLOC_STEP, SALLOC, SBATCH], ids=["salloc-step", "salloc", "sbatch"])
def test_a_plain_command_in_a_job_is_one_process_with_a_note_on_how_to_start_more(env: dict[str, str]) -> None:
    alone = place(env, pid=300)
    assert alone == Place()
    assert alone.note.startswith(
        "note: this is one process in a SLURM job of 4 tasks; srun python ... starts one per task"
    )
    # the batch script and the shell that ssh starts have numbers of SLURM's own, too
    for step in ("4294967291", "4294967292"):
        assert place({**env, "SLURM_STEP_ID": step}, pid=300) == Place()


def test_steps_started_from_the_shell_are_ranks() -> None:
    step = {**SALLOC, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}
    step |= {"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_TASK_PID": "77"}
    assert place(step, pid=77) == place(step, pid=78) == Place(2, 4, 2, 4, "127.0.0.1", 20004)
    one = {**step, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert place(one) == Place()
    assert place({**one, "SLURM_PTY_PORT": "1"}) == Place()  # srun --pty bash
    # a step within a larger job that inherits its SLURM_NTASKS
    assert place({**one, "SLURM_NTASKS": "4"}) == Place()
    # an older Slurm without SLURM_STEP_NUM_TASKS
    del step["SLURM_STEP_NUM_TASKS"]
    assert place(step, pid=77).world_size == 4


def test_a_shell_that_is_the_first_of_several_tasks_is_refused() -> None:
    # srun --pty python: the process is the task
    assert place(PTY, pid=29) == Place(0, 4, 0, 4, "127.0.0.1", 20001)
    with pytest.raises(ValueError, match=r"this shell is the first of 4 tasks of srun --pty") as error:
        place(PTY, pid=300)
    for command in ("srun --ntasks 4 python ...", "torchrun --nproc_per_node N ...", "env RANK=0 WORLD_SIZE=1 python"):
        assert command in str(error.value)
    assert place({**PTY, "RANK": "0", "WORLD_SIZE": "1"}, pid=300) == Place()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_other_launchers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"started 4 processes .* use torchrun --nproc_per_node 4"):
        place({name: "4"})
    assert place({name: "1"}) == Place()
    assert place({**SRUN, name: "8", "MASTER_ADDR": "x"}).world_size == 8


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set in the environment"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' in the environment is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2, local rank 0 of 2: out of range"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 of WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "local rank 3 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a valid port"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": ""}, "MASTER_PORT='' in the environment is not a number"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' in the environment is not a number"),
        ({**SRUN, "SLURM_PROCID": "8"}, "SLURM_PROCID=8 of SLURM_STEP_NUM_TASKS=8"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}, "SLURM_PROCID is not set in the environment"),
    ],
)
def test_environments_that_contradict_themselves(env: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as error:
        place(env)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_scripts_say_it_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, PRETRAIN, "--dry-run"], capture_output=True, text=True, env={"RANK": "8"}, timeout=60
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: WORLD_SIZE is not set in the environment, but other variables of a launcher are")
    argv = [sys.executable, PRETRAIN, "--preset", "tiny", "--dry-run", "train.device=cpu"]
    done = subprocess.run(argv, capture_output=True, text=True, env=SALLOC_STEP, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("note: this is one process in a SLURM job of 4 tasks")


def test_a_world_size_without_ranks_is_enough_for_a_plan_and_not_for_a_run(tmp_path: Path) -> None:
    assert place({"WORLD_SIZE": "4"}) == Place(0, 4, 0, 4)
    argv = [sys.executable, PRETRAIN, "--preset", "tiny", "train.device=cpu", f"train.run_dir={tmp_path / 'run'}"]
    done = subprocess.run([*argv, "--dry-run"], capture_output=True, text=True, env={"WORLD_SIZE": "4"}, timeout=60)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(argv, capture_output=True, text=True, env={"WORLD_SIZE": "4"}, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: WORLD_SIZE=4 is set but RANK is not, so no launcher has started the other ranks"
    )
    assert not (tmp_path / "run").exists()
