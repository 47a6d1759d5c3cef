"""The compiled kernels compared with torch eager and torch.compile, forward and backward, on this machine's CPU.

    python benchmarks/kernels.py            # prints a table and writes benchmarks/results/kernels-cpu.md

All contenders run in turn within each of five rounds, so that other load on the machine affects them equally. The table
shows the median and, in brackets, the fastest and slowest round.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalite.ops import apply_rope, causal_softmax, rope_cos_sin
from megalite.run.world import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "kernels-cpu.md"
ROUNDS = 5
SCALE = 0.125

Op = Callable[[torch.Tensor], torch.Tensor]


def softmax_contenders(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Op]:
    """Eager is what models write: separate ops for scale, mask, float32 softmax and cast, with a mask made once."""
    hidden = torch.ones(shape[-2:], dtype=torch.bool).triu(1)

    def eager(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax((x * SCALE).masked_fill(hidden, -torch.inf), -1, dtype=torch.float32).to(dtype)

    return {"ours": lambda x: causal_softmax(x, SCALE, "fused"), "eager": eager, "compile": torch.compile(eager)}


def rope_contenders(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Op]:
    """Eager is Hugging Face's rotate_half."""
    cos, sin = rope_cos_sin(torch.arange(shape[1]), shape[-1])
    wide_cos, wide_sin = (torch.cat([t, t], -1)[:, None, :].to(dtype) for t in (cos, sin))

    def eager(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * wide_cos + torch.cat([-second, first], -1) * wide_sin

    return {"ours": lambda x: apply_rope(x, cos, sin, "fused"), "eager": eager, "compile": torch.compile(eager)}


CASES = [
    ("scale + causal mask + softmax", softmax_contenders, (1, 8, 256, 256)),
    ("scale + causal mask + softmax", softmax_contenders, (1, 8, 1024, 1024)),
    ("scale + causal mask + softmax", softmax_contenders, (1, 16, 2048, 2048)),
    ("RoPE", rope_contenders, (1, 256, 8, 32)),
    ("RoPE", rope_contenders, (1, 2048, 32, 128)),
]


def step_ms(op: Op, x: torch.Tensor, grad: torch.Tensor, repeats: int) -> float:
    """Milliseconds of one forward and backward, averaged over `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        x.grad = None
        op(x).backward(grad)
    return (time.perf_counter() - start) / repeats * 1e3


def measure(contenders: dict[str, Op], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, list[float]]:
    """Milliseconds of each round by contender, after a warm-up that includes compilation."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    grad = torch.randn(shape).to(dtype)
    for op in contenders.values():
        step_ms(op, x, grad, 2)
    repeats = max(1, 2_000_000 // x.numel())
    rounds = [{name: step_ms(op, x, grad, repeats) for name, op in contenders.items()} for _ in range(ROUNDS)]
    return {name: [r[name] for r in rounds] for name in contenders}


def cell(times: list[float]) -> str:
    """Median [fastest–slowest]."""
    return f"{statistics.median(times):.3g} [{min(times):.3g}–{max(times):.3g}]"


def table() -> list[str]:
    """Markdown rows of all cases."""
    rows = [
        "| op | shape | dtype | ours | eager | compile | eager / ours | compile / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, contenders, shape in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            times = measure(contenders(shape, dtype), shape, dtype)
            ours, *rivals = (statistics.median(times[key]) for key in ("ours", "eager", "compile"))
            cells = [name, str(list(shape)), str(dtype).removeprefix("torch."), *map(cell, times.values())]
            rows.append(f"| {' | '.join(cells + [f'{rival / ours:.1f}' for rival in rivals])} |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    lines = [
        "# Kernels on a CPU",
        "",
        f"Forward + backward, ms: median of {ROUNDS} interleaved rounds [fastest–slowest]. {cpu}, "
        f"{args.threads} thread(s), torch {torch.__version__}. Made by `benchmarks/kernels.py`.",
    ]
    lines += ["", "## With glibc's own memory settings", "", *table()]
    keep_freed_memory()
    lines += ["", "## With freed memory kept (`mallopt`)", "", *table(), ""]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
