"""bf16 (fp32 masters, moments and gradients) against fp32, and tp 2 x pp 2 against one process, on the demo's data.

python benchmarks/precision.py [STEPS]      writes results/precision.md and results/precision.png
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.watch.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SPLIT = ["parallel.tp=2", "parallel.pp=2"]
RUNS = {
    "fp32, 1 process": (1, ["train.dtype=fp32"]),
    "bf16, 1 process": (1, ["train.dtype=bf16"]),
    "bf16, tp 2 x pp 2": (4, ["train.dtype=bf16", *SPLIT]),
    "fp32, tp 2 x pp 2": (4, ["train.dtype=fp32", *SPLIT]),
}
PAIRS = [
    ("bf16, 1 process", "fp32, 1 process"),
    ("bf16, tp 2 x pp 2", "bf16, 1 process"),
    ("fp32, tp 2 x pp 2", "fp32, 1 process"),
]


def train(run_dir: Path, ranks: int, steps: int, more: list[str]) -> dict[str, list[float]]:
    """Run the tiny preset; returns the training losses and the held-out losses by name."""
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else [sys.executable]
    )
    script = ["examples/pretrain_7b.py", "--preset", "tiny", f"train.steps={steps}", f"train.run_dir={run_dir}"]
    subprocess.run([*launcher, *script, "train.device=cpu", "log.plot=false", *more], cwd=ROOT, check=True)
    metrics = read_metrics(run_dir)
    curve = {"training": [row["loss"] for row in metrics["train"]]}
    for row in metrics["eval"]:
        curve.setdefault(f"held out {row['name']}", []).append(row["loss"])
    return curve


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            name: train(Path(folder, str(i)), ranks, steps, more)
            for i, (name, (ranks, more)) in enumerate(RUNS.items())
        }
    lines = [
        "# Precision\n",
        f"`python benchmarks/precision.py {steps}`: preset tiny, {steps} steps, largest relative differences.\n",
    ]
    lines += ["| run | against | training loss, any step | held-out loss, at the end |", "|---|---|---|---|"]
    for a, b in PAIRS:
        largest = max(abs(x - y) / y for x, y in zip(curves[a]["training"], curves[b]["training"]))
        end = max(abs(v[-1] - curves[b][k][-1]) / curves[b][k][-1] for k, v in curves[a].items() if k != "training")
        lines.append(f"| {a} | {b} | {largest:.1e} | {end:.1e} |")
    lines += ["\n| run | training loss, last step | held out en | held out zh |", "|---|---|---|---|"]
    for name, curve in curves.items():
        ends = [f"{curve[key][-1]:.4f}" for key in ("training", "held out en", "held out zh")]
        lines.append(f"| {name} | {' | '.join(ends)} |")
    lines.append("\n![curves](precision.png)")
    (RESULTS / "precision.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    draw(curves)


def draw(curves: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), dpi=100, sharex=True, height_ratios=[2, 1])
    for name, curve in curves.items():
        top.plot(range(1, len(curve["training"]) + 1), curve["training"], linewidth=1, label=name)
    top.set(ylabel="training loss (nats per token)", title="The same run in two precisions and two layouts")
    top.legend(frameon=False)
    for a, b in PAIRS:
        difference = [abs(x - y) / y for x, y in zip(curves[a]["training"], curves[b]["training"])]
        values = [max(x, 1e-9) for x in difference]
        bottom.semilogy(range(1, len(values) + 1), values, linewidth=1, label=f"{a} / {b}")
    bottom.set(xlabel="step", ylabel="relative difference")
    bottom.legend(frameon=False, fontsize=7)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(RESULTS / "precision.png")


if __name__ == "__main__":
    main()
