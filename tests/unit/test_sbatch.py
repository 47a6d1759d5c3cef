"""The job scripts with fake Slurm commands: which script they start with which arguments, and when they requeue."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
printf '%s ' srun "$@" | tr '\\n\\t' '  '; echo
mkdir -p "$RUN_DIR"
[[ -z $LEAVES ]] || { printf 'step 7\\nreason USR1\\n' > "$RUN_DIR/REQUEUE"; kill -USR1 $PPID; sleep 1; }
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && echo node1 || echo "scontrol $*"
"""


def submit(tmp_path: Path, script: str, *argv: str, leaves: str = "") -> subprocess.CompletedProcess[str]:
    """Run a job script as slurmd would."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/bash\nexec /bin/sleep 0.2\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        **{"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"},
        **{"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "16", "TMPDIR": str(tmp_path)},
        **{"RUN_DIR": str(tmp_path / "run"), "LEAVES": leaves},
    }
    return subprocess.run(
        ["bash", ROOT / "examples" / "slurm" / script, *argv, f"train.run_dir={tmp_path / 'run'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("script", "entry", "argv"),
    [
        ("pretrain_7b.sbatch", "examples/pretrain_7b.py", ["--preset", "tiny"]),
        ("sft_7b.sbatch", "examples/sft_7b.py", ["--preset", "tiny", "data.sft=chats.jsonl", "data.template=plain"]),
    ],
)
def test_a_job_starts_its_script_and_ends(tmp_path: Path, script: str, entry: str, argv: list[str]) -> None:
    ended = submit(tmp_path, script, *argv)
    assert ended.returncode == 0, ended
    (srun,) = (line for line in ended.stdout.splitlines() if line.startswith("srun "))
    assert "--nnodes 2 --nproc_per_node 4 --max_restarts 0" in srun
    assert "--rdzv_endpoint node1:21234" in srun
    assert srun.rstrip().endswith(f"{entry} {' '.join(argv)} train.run_dir={tmp_path / 'run'}")
    assert "scontrol requeue" not in ended.stdout


def test_an_instruction_tuning_job_that_is_stopped_requeues_itself(tmp_path: Path) -> None:
    ended = submit(tmp_path, "sft_7b.sbatch", "--preset", "tiny", leaves="1")
    assert "USR1 after" in ended.stdout, ended
    assert (tmp_path / "run" / "STOP").exists()
    assert "step 7 reason USR1" in ended.stdout
    assert "scontrol requeue 41234" in ended.stdout


def test_a_mistake_in_the_arguments_ends_the_job(tmp_path: Path) -> None:
    ended = submit(tmp_path, "sft_7b.sbatch", "--preset", "tiny", "train.stepz=3")
    assert ended.returncode == 2, ended
    assert "unknown key train.stepz" in ended.stderr
    assert "srun" not in ended.stdout
