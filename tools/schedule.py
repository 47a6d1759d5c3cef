#!/usr/bin/env python3
"""Show a pipeline schedule: what each rank does when, how long it idles, how many activations it keeps."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.config.schedules import SCHEDULES, nearest
from megalite.launch.arguments import Parser
from megalite.pipeline.draw import save_png, text_grid
from megalite.pipeline.lower import lower
from megalite.pipeline.schedule import forward_only, make_plan
from megalite.pipeline.simulate import Costs, simulate

EXAMPLES = """examples:
  python tools/schedule.py 1f1b --stages 4 --microbatches 8
  python tools/schedule.py gpipe --stages 4 --microbatches 8 --png gpipe.png
  python tools/schedule.py 1f1b --stages 4 --microbatches 8 --stage-factors 1 1 1 1.5
  python tools/schedule.py interleaved --stages 4 --chunks 2 --microbatches 8
  python tools/schedule.py zb-h1 --stages 4 --microbatches 8
"""


def build_parser() -> Parser:
    parser = Parser(description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("schedule", help=f"{', '.join(SCHEDULES)} or forward_only")
    add("--stages", type=int, required=True, metavar="P", help="pipeline ranks, parallel.pp")
    add("--chunks", type=int, default=1, metavar="V", help="stages on each rank, parallel.chunks; default: 1")
    add("--microbatches", type=int, required=True, metavar="M", help="microbatches a step")
    add("--forward-cost", type=float, default=1, metavar="T", help="time of one forward of one stage; default: 1")
    halves = "time of one backward of one stage; its halves, where it is split, cost half of it; default: 2"
    add("--backward-cost", type=float, default=2, metavar="T", help=halves)
    add("--communication-cost", type=float, default=0, metavar="T", help="time of one transfer; default: 0")
    factors = "one factor per stage on its costs, for stages of unequal size; default: all 1"
    add("--stage-factors", type=float, nargs="+", default=[], metavar="X", help=factors)
    lowered = "also list every rank's actions with their SEND and RECV, and play them with blocking sends"
    add("--lowered", action="store_true", help=lowered)
    add("--png", metavar="FILE", help="also draw it; needs pip install megalite[plot]")
    return parser


def show(args: argparse.Namespace) -> None:
    p, m, v = args.stages, args.microbatches, args.chunks
    known = (*SCHEDULES, "forward_only")
    if args.schedule not in known and (near := nearest(args.schedule)):
        raise ValueError(f"unknown schedule {args.schedule!r}: did you mean {near}? use one of {', '.join(known)}")
    if v == 1 and args.schedule in SCHEDULES and SCHEDULES[args.schedule].chunked:
        raise ValueError(f"schedule {args.schedule} with --chunks 1 is 1f1b with more warmup; use --chunks 2 or more")
    plan = (forward_only if args.schedule == "forward_only" else partial(make_plan, args.schedule))(p, m, v)
    if args.stage_factors and len(args.stage_factors) != p * v:
        raise ValueError(
            f"--stage-factors has {len(args.stage_factors)} numbers for --stages {p} x --chunks {v}; give {p * v}"
        )
    half, factors = args.backward_cost / 2, tuple(args.stage_factors)
    costs = Costs(args.forward_cost, args.backward_cost, half, half, args.communication_cost, factors)
    played = simulate(plan, costs)
    tty = sys.stdout.isatty()
    print(text_grid(played, shutil.get_terminal_size().columns if tty else None, colour=tty))
    formula = f"1F1B's (p-1)/(m+p-1) = {(p - 1) / (m + p - 1):.2%}"
    if args.stage_factors or args.communication_cost:
        formula += " for equal stages and free transfers"
    print(f"\nmakespan  {played.makespan:g}")
    print(f"bubble    {played.bubble:.2%}; {formula}")
    print(f"peak live activations, by rank  {' '.join(map(str, played.peak_live))}")
    if args.lowered:
        lowered = lower(plan, costs)
        print("\nlowered")
        for rank, actions in enumerate(lowered):
            print(f"rank {rank}: {' '.join(map(str, actions))}")
        blocked = simulate(lowered, costs, blocking_sends=True)
        sends = sum(action.op == "SEND" for actions in lowered for action in actions)
        print(f"{sends} transfers; with blocking sends: no deadlock, makespan {blocked.makespan:g}")
    if args.png:
        chunks = f", v = {v}" if v > 1 else ""
        title = f"{args.schedule}: p = {p}, m = {m}{chunks}, bubble {played.bubble:.1%}, peak {max(played.peak_live)}"
        save_png(played, args.png, f"{title} live activations")


def main() -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us without a traceback
    args = build_parser().parse_args()
    try:
        show(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
