"""Peak memory of each rank on the 125m preset, by the allocator's events, compared with the plan's arithmetic.

    python benchmarks/memory.py      writes results/memory-125m.md

Recomputation none, selective and full; ZeRO-1 off and on at dp 1, 2 and 4. Counts what a rank has allocated and not
freed, from before its engine is built to the end of its second step.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "dist"))

from ranks import Ranks

from megalite.config import Resolved, parse_command_line, resolve
from megalite.plan.costs import Memory, memory

ROOT = Path(__file__).resolve().parent.parent
SEQ, BATCH, STEPS = 256, 4, 2
CASES = [("recompute", value, 1, 0) for value in ("none", "selective", "full")]
CASES += [("zero", "none", dp, zero) for dp in (1, 2, 4) for zero in (0, 1)]


def configuration(recompute: str, dp: int, zero: int) -> Resolved:
    words = [f"parallel.recompute={recompute}", f"parallel.dp={dp}", f"parallel.zero={zero}", "train.device=cpu"]
    words += ["parallel.tp=1", "parallel.pp=1", f"train.seq_len={SEQ}", f"train.micro_batch_size={BATCH}"]
    words += [f"train.global_batch_size={BATCH * dp}", "train.threads=1"]
    return resolve(parse_command_line(["--preset", "125m", *words], default_preset=None, prog="memory").config, dp)


def measure(folder: str, recompute: str, dp: int, zero: int) -> int:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from megalite.engine.batches import Microbatch
    from megalite.engine.engine import build
    from megalite.run.world import start_world

    config = configuration(recompute, dp, zero)
    with start_world(config) as world:
        tokens = torch.randint(0, 32000, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(world.rank))
        positions = torch.arange(SEQ).expand(BATCH, SEQ)
        microbatch = Microbatch(tokens[:, :-1], tokens[:, 1:], torch.ones(BATCH, SEQ), positions)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            engine = build(config, world)
            for _ in range(STEPS):
                engine.forward_backward([microbatch])
                engine.update(1e-4, 1.0 / tokens.numel())
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        total = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
        Path(folder, f"{world.rank}.json").write_text(json.dumps(peak))
    return 0


def planned(config: Resolved) -> Memory:
    return dataclasses.replace(memory(config, "cpu"), overhead=0)


def main() -> int:
    lines = [
        "# Peak memory of a rank, 125m preset\n",
        f"`python benchmarks/memory.py`: bf16, [{BATCH}, {SEQ}] tokens.\n",
    ]
    lines += ["| recompute | dp | ZeRO | rank | measured MiB | planned MiB | ratio |", "|---|---|---|---|---|---|---|"]
    worst = 0.0
    for _, recompute, dp, zero in CASES:
        with tempfile.TemporaryDirectory() as folder:
            with Ranks(dp, measure, folder, recompute, dp, zero) as ranks:
                ended = ranks.wait(timeout_s=300)
            assert set(ended.codes) == {0}, ended
            plan = planned(configuration(recompute, dp, zero)).total
            for rank in range(dp):
                peak = json.loads(Path(folder, f"{rank}.json").read_text())
                worst = max(worst, abs(peak / plan - 1))
                sizes = f"{peak / 2**20:.0f} | {plan / 2**20:.0f} | {peak / plan:.3f}"
                row = f"| {recompute} | {dp} | {zero} | {rank} | {sizes} |"
                print(row, flush=True)
                lines.append(row)
    lines.append(f"\nLargest difference from the plan: {worst:.1%}.")
    (ROOT / "benchmarks" / "results" / "memory-125m.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
