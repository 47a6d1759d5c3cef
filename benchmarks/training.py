"""Training throughput on this CPU: megalite at several topologies, Hugging Face's Llama, and torch's DDP.

    python benchmarks/training.py                       # both shapes, five rounds; writes results/training-cpu.md
    python benchmarks/training.py --rounds 1 --steps 1  # a smoke test; prints, writes nothing

Each contender runs in its own processes (contenders.py), with cores / ranks threads each, as a user would set them. All
are started at once and train in turn within each round, so that other load on the machine affects them equally. All
start from the same weights, see the same batch, and do the same work: forward, backward, clipping, AdamW, in fp32.
Their losses are compared before any timing.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from contenders import Contender, Shape

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "training-cpu.md"


SHAPES = (
    Shape("small", 256, 8, 8, 4, 688, 32000, 256, 1, 8),
    Shape("very small", 64, 4, 4, 2, 176, 512, 64, 1, 8),
)


RIVAL = "transformers"
CONTENDERS = (
    Contender(RIVAL, RIVAL),
    Contender("torch DDP, dp 2", "ddp", dp=2),
    Contender("megalite, 1 process", "megalite"),
    Contender("megalite, dp 2", "megalite", dp=2),
    Contender("megalite, tp 2", "megalite", tp=2),
    Contender("megalite, pp 2", "megalite", pp=2),
    Contender("megalite, tp 2 x pp 2", "megalite", tp=2, pp=2),
)


class Run:
    """The processes of one contender, idle between calls of `train`."""

    def __init__(self, shape: Shape, contender: Contender) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        asked = json.dumps([asdict(shape), asdict(contender)])
        shared = {"WORLD_SIZE": contender.ranks, "LOCAL_WORLD_SIZE": contender.ranks, "MASTER_PORT": port}
        self.contender, self.processes = contender, []
        for rank in range(contender.ranks):
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": HERE.parent}
            environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
            environment |= {key: str(value) for key, value in own.items()}
            command = [sys.executable, HERE / "contenders.py", asked]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))  # type: ignore[call-overload]
        self._answers("ready")

    def _answers(self, expected: str = "") -> list[str]:
        answers = [process.stdout.readline().strip() for process in self.processes]
        if not all(answers) or (expected and set(answers) != {expected}):
            self.end()
            sys.exit(f"error: {self.contender.name} failed; see its output above")
        return answers

    def train(self, steps: int) -> tuple[float, float]:
        """Train `steps` steps; returns (seconds of the slowest rank, last loss)."""
        for process in self.processes:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers = [json.loads(answer) for answer in self._answers()]
        return max(seconds for seconds, _ in answers), answers[0][1]

    def end(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(shape: Shape, rounds: int, steps: int) -> dict[str, list[float]]:
    """Tokens per second in each round, by contender, after two steps of warm-up."""
    with ExitStack() as stack:
        runs = []
        for contender in CONTENDERS:
            runs.append(Run(shape, contender))
            stack.callback(runs[-1].end)
        losses = {run.contender.name: run.train(2)[1] for run in runs}
        # the second loss comes after one update
        differences = {name: abs(loss - losses[RIVAL]) / losses[RIVAL] for name, loss in losses.items()}
        print(
            f"{shape.name}: second loss {losses[RIVAL]:.6f}, largest difference {max(differences.values()):.0e}",
            flush=True,
        )
        if max(differences.values()) > 1e-4:
            sys.exit(f"error: the contenders do not train the same model: {losses}")
        speeds: dict[str, list[float]] = {run.contender.name: [] for run in runs}
        for number in range(rounds):
            for run in runs:
                seconds, _ = run.train(steps)
                speeds[run.contender.name].append(steps * shape.tokens / seconds)
            print(f"{shape.name}: round {number + 1} of {rounds} done", flush=True)
        return speeds


def table(speeds: dict[str, list[float]], cores: int) -> list[str]:
    """Markdown rows; each ratio is the median over the rounds' ratios."""
    rows = [
        f"| contender | ranks x threads | tokens/s | / {RIVAL} |",
        "|---|---|---|---|",
    ]
    for contender in CONTENDERS:
        found = speeds[contender.name]
        ratios = [a / b for a, b in zip(found, speeds[RIVAL])]
        cells = [
            contender.name,
            f"{contender.ranks} x {max(1, cores // contender.ranks)}",
            f"{statistics.median(found):,.0f} [{min(found):,.0f}–{max(found):,.0f}]",
            f"{statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(shapes: Sequence[Shape], rounds: int, steps: int) -> str:
    from importlib.metadata import version

    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        "# Training on a CPU",
        "",
        f"Tokens per second, fp32: median of {rounds} interleaved rounds of {steps} steps [slowest–fastest], and",
        f"the ratio to {RIVAL} round by round. {machine()}, {cores} cores, load {load:.1f} at the start, {versions}.",
        "Made by `benchmarks/training.py`.",
        "",
        "Each rank has cores / ranks threads, at least one; with more ranks than cores, ranks share a core.",
    ]
    for shape in shapes:
        rows = table(measure(shape, rounds, steps), cores)
        print("\n".join(rows), flush=True)
        lines += [
            "",
            f"## {shape.name.capitalize()}",
            "",
            f"hidden {shape.hidden}, {shape.layers} layers, {shape.heads} heads, {shape.kv_heads} kv heads, "
            f"ffn {shape.ffn}, vocabulary {shape.vocab}, sequence {shape.seq}, "
            f"{shape.microbatches} microbatches of {shape.micro_batch}.",
            "",
            *rows,
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps per contender and round")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shape", choices=names, help="run only this shape; writes nothing without --output")
    parser.add_argument(
        "--output", type=Path, help="default for all shapes in five rounds or more: results/training-cpu.md"
    )
    args = parser.parse_args()
    text = report([shape for shape in SHAPES if args.shape in (None, shape.name)], args.rounds, args.steps)
    output = args.output or (RESULTS if args.rounds >= 5 and args.shape is None else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
