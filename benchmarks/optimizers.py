"""AdamW and Muon on the demo's data: the same model, batches and schedule, one process.

python benchmarks/optimizers.py [STEPS]      writes results/optimizers.md and results/optimizers.png
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from precision import RESULTS, train

RUNS = {"AdamW": ["optim.name=adamw"], "Muon": ["optim.name=muon"]}


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: train(Path(folder, name), 1, steps, more) for name, more in RUNS.items()}
    lines = [
        "# Optimizers\n",
        f"`python benchmarks/optimizers.py {steps}`: preset tiny, fp32, each at the preset's own lr.\n",
    ]
    lines += [
        "| optimizer | training loss, mean of the last 10 steps | held out en | held out zh |",
        "|---|---|---|---|",
    ]
    for name, curve in curves.items():
        last = sum(curve["training"][-10:]) / 10
        lines.append(f"| {name} | {last:.4f} | {curve['held out en'][-1]:.4f} | {curve['held out zh'][-1]:.4f} |")
    lines.append("\n![curves](optimizers.png)")
    (RESULTS / "optimizers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), dpi=100)
    for name, curve in curves.items():
        axes.plot(range(1, len(curve["training"]) + 1), curve["training"], linewidth=1, label=name)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", title="AdamW and Muon on the demo")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "optimizers.png")


if __name__ == "__main__":
    main()
