"""Tokens per second of two checkouts of megalite, by the same command in turn: did a change cost speed?

    python benchmarks/revisions.py BEFORE AFTER [--rounds 5]

Each is a checkout with its own .venv (`make install`). They take turns, and in every second round the other one begins.
Prints medians, and of the ratios of the rounds the median, the least and the largest.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

SHAPE = {"num_layers": 8, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 688}
BATCH = {"seq_len": 256, "micro_batch_size": 1, "global_batch_size": 8, "steps": 10, "eval_samples": 1}
LAYOUTS = {"one process": (1, 1), "tp 2": (2, 1), "pp 2": (1, 2)}
WARMUP = 3


def measure(checkout: Path, tp: int, pp: int, folder: Path) -> float:
    """Median tokens/s of the steps after the first few. Raises CalledProcessError if the run fails."""
    run_dir, ranks = folder / "run", tp * pp
    shutil.rmtree(run_dir, ignore_errors=True)
    keys = [f"model.{key}={value}" for key, value in SHAPE.items()]
    keys += [f"train.{key}={value}" for key, value in BATCH.items()]
    keys += [f"parallel.tp={tp}", f"parallel.pp={pp}", f"train.run_dir={run_dir}", f"data.cache_dir={folder}/cache"]
    start = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", "29871"] if ranks > 1 else ["python"]
    start[0] = str(checkout / ".venv" / "bin" / start[0])
    script = ["examples/pretrain_7b.py", "--preset", "tiny", "log.plot=false"]
    subprocess.run([*start, *script, *keys], cwd=checkout, check=True, capture_output=True)
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return statistics.median([row["tokens_per_s"] for row in rows if "tokens_per_s" in row][WARMUP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout with a .venv")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; default: 5")
    options = parser.parse_args()
    checkouts = [options.before.resolve(), options.after.resolve()]
    for name, (tp, pp) in LAYOUTS.items():
        speeds: list[list[float]] = [[], []]
        with tempfile.TemporaryDirectory() as scratch:
            for number in range(options.rounds):
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    speeds[which].append(measure(checkouts[which], tp, pp, Path(scratch)))
        ratios = [after / before for before, after in zip(*speeds, strict=True)]
        print(
            f"{name:12} before {statistics.median(speeds[0]):,.0f}, after {statistics.median(speeds[1]):,.0f} "
            f"tokens/s; after / before {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
