"""`make slurm`: a preempted job of two nodes, on a real Slurm cluster that this machine plays by itself.

Submits examples/slurm/pretrain_7b.sbatch as a user would, sends it the signal that comes before a time limit, and
checks that it saves, requeues itself, and ends with the losses of one process that nobody disturbed. A script and not
pytest's, since it needs root and a minute or two, and its log is worth reading.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalite.checkpoint.folder import complete
from megalite.data.indexed import IndexedWriter

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CLUSTER = str(HERE / "slurm-cluster")
PRETRAIN = "examples/pretrain_7b.py"
STEPS, USR1_AFTER = 50, 3
# a machine with other work takes its time: these only end what hangs
PATIENCE_S = 240.0
BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


def check(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)
    say(f"ok: {text}")


def wait_for(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"{PATIENCE_S:.0f} s without {what}")
        time.sleep(0.1)


def cannot() -> str:
    """Why no cluster can run here, or ''."""
    if os.geteuid() != 0:
        return "it needs root, to make namespaces and start slurmd"
    unshare = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "sh", "-c"]
    tries = [
        ("this machine makes no namespaces", [*unshare, "mount -t proc proc /proc"]),
        ("Debian's Slurm is not here and cannot be installed", [CLUSTER, "install"]),
        (
            "this machine joins no namespaces",
            [*unshare, "ip link add name br0 type bridge && ip link add name v0 type veth"],
        ),
    ]
    for why, words in tries:
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            return f"{why} ({error})"
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode:
            return f"{why} ({last})"
        if last:
            say(last)
    return ""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Two nodes, and the environment in which sbatch and srun mean them; ended whatever happens."""
    environment = {**os.environ, "SLURM_TEST_DIR": str(folder), "SLURM_TEST_TTL": "1200"}
    try:
        subprocess.run([CLUSTER, "start", "2"], env=environment, stdout=subprocess.DEVNULL, check=True)
        here = [str(folder / "bin"), str(Path(sys.executable).parent)]
        yield {**environment, "PATH": os.pathsep.join([*here, os.environ["PATH"]]), "TMPDIR": str(folder.parent)}
    finally:
        subprocess.run([CLUSTER, "stop"], env=environment, check=False)


def command(environment: dict[str, str], *words: str) -> str:
    """What a command prints, run in the repository."""
    done = subprocess.run(words, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{shlex.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def rows(run_dir: Path, kind: str) -> list[dict]:
    """Every finished line of the metrics, in the order of writing: a step done twice is there twice."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def largest_difference(run_dir: Path, reference: Path) -> float:
    pairs = zip(rows(run_dir, "train"), rows(reference, "train"))
    return max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)


def settings(folder: Path) -> list[str]:
    """The preset tiny on forty chapters as bytes, which need no tokenizer."""
    with (
        (REPOSITORY / "examples" / "corpus" / "kjv.jsonl").open(encoding="utf-8") as lines,
        IndexedWriter(folder / "text", vocab_size=257) as writer,
    ):
        for _, line in zip(range(40), lines):
            writer.add_document([*json.loads(line)["text"].encode(), 256])
    return [
        *("--preset", "tiny", f"data.path={folder / 'text'}", "train.device=cpu", "train.threads=1"),
        *("train.seq_len=64", "train.micro_batch_size=2", "train.global_batch_size=8", f"train.steps={STEPS}"),
        *("train.eval_interval=0", "train.eval_samples=8", "checkpoint.interval=0", "log.plot=false"),
        # a learning rate that depends on no number of steps, and is low enough for rounding to stay small
        *("optim.lr_schedule=constant", "optim.lr=1e-3", "optim.warmup_samples=80"),
    ]


def preempted(slurm: dict[str, str], folder: Path, arguments: Sequence[str], reference: Path) -> None:
    """Submit, disturb, and follow the job to its end."""
    run_dir, log = folder / "preempted", folder / "job.log"
    options = ["--parsable", "--time=20", f"--output={log}", "examples/slurm/pretrain_7b.sbatch"]
    script = ["sbatch", *options, *arguments, f"train.run_dir={run_dir}"]
    job = command({**slurm, "NPROC": "2"}, *script)

    def field(name: str) -> str:
        words = command(slurm, "scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def reached(state: str) -> bool:
        found = field("JobState")
        if found in ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
            raise AssertionError(f"the job is {found}")
        return found == state

    try:
        wait_for("the job's start", lambda: reached("RUNNING"))
        say(f"start: job {job} runs on {field('NodeList')}, 2 nodes x 2 ranks, tp 2 x pp 2")
        wait_for(f"step {USR1_AFTER}", lambda: len(rows(run_dir, "train")) >= USR1_AFTER or not reached("RUNNING"))
        command(slurm, "scancel", "--batch", "--signal=USR1", job)
        say(f"USR1 to the job script, after step {len(rows(run_dir, 'train'))} of {STEPS}")
        marker = run_dir / "REQUEUE"
        wait_for("REQUEUE", lambda: (marker.exists() and "time" in marker.read_text()) or reached("COMPLETED"))
        check(marker.exists(), "the trainer has left REQUEUE")
        stopped = len(rows(run_dir, "train"))
        told = " ".join(marker.read_text().splitlines())
        check(told.startswith(f"step {stopped} reason "), f"save: REQUEUE says {told}")
        check(stopped < STEPS, f"all ranks stopped at step {stopped}, before the end")
        (saved,) = complete(run_dir)
        shards = sorted(path.name for path in saved.glob("*.safetensors"))
        check(
            saved.name == f"step-{stopped:08d}" and shards == [f"rank-{rank:05d}-000.safetensors" for rank in range(4)],
            f"{saved.name} is the one checkpoint, with a file of each of the 4 ranks",
        )
        wait_for("the requeue", lambda: field("Restarts") == "1")
        say(f"requeue: the job is {field('JobState')}, Restarts=1")
        wait_for("the second start", lambda: reached("RUNNING"))
        say("start: the job runs again")
        wait_for("the second attempt", lambda: len(rows(run_dir, "start")) == 2 or not reached("RUNNING"))
        check([row["at_step"] for row in rows(run_dir, "start")] == [0, stopped], f"resume at step {stopped}")
        wait_for("the end", lambda: reached("COMPLETED"))
        say("end: the job is COMPLETED")
        steps = [row["step"] for row in rows(run_dir, "train")]
        check(steps == list(range(1, STEPS + 1)), f"steps 1 to {STEPS}, each done once")
        check(not marker.exists(), "no REQUEUE is left")
        off = largest_difference(run_dir, reference)
        check(off < 1e-5, f"its losses are those of one process, to {off:.1e}")
    finally:
        print("".join(f"         | {line}\n" for line in log.read_text().splitlines()) if log.exists() else "")


def main() -> int:
    why = cannot()
    if why:
        print(f"SLURM test passed over: {why}")
        return 0
    # so that a runner's time-out ends the cluster too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="megalite-slurm-") as name:
        folder = Path(name)
        arguments = settings(folder)
        one = folder / "one"
        alone = [sys.executable, PRETRAIN, *arguments, "parallel.tp=1", "parallel.pp=1", f"train.run_dir={one}"]
        command(dict(os.environ), *alone)
        say(f"one process, undisturbed: loss {rows(one, 'train')[-1]['loss']:.4f} after {STEPS} steps")
        with cluster(folder / "cluster") as slurm:
            say("a cluster of two nodes runs")
            preempted(slurm, folder, arguments, one)
            plain = folder / "plain"
            srun = ["srun", "--nodes=2", "--ntasks-per-node=2", "--time=10", sys.executable, PRETRAIN]
            more = [f"train.run_dir={plain}", "train.steps=3"]
            command({**slurm, "MASTER_ADDR": "node1"}, *srun, *arguments, *more)
            off = largest_difference(plain, one)
            check(len(rows(plain, "train")) == 3 and off < 1e-5, f"srun without torchrun: 3 steps, to {off:.1e}")
    say("passed")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AssertionError as error:
        say(f"FAILED: {error}")
        sys.exit(1)
