"""`python -m megalite.doctor`: exit status 0 when training can run here, 1 when something required is missing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from megalite import __version__, doctor
from megalite.doctor import Finding, Findings, machine, ranks, said, software
from megalite.launch.arguments import Parser

Probe = Callable[[], Findings]
SECTIONS: dict[str, Sequence[Probe]] = {
    "machine": (machine.python, machine.system, machine.cores, machine.memory, machine.limits, machine.disk),
    "packages": (software.packages,),
    "kernels": (software.built, software.kernels),
    "GPUs": (machine.gpus, software.apex),
    "ranks": (ranks.launchers, ranks.slurm, ranks.port, ranks.host_name, ranks.environment),
}
COLOURS = {"ok": "32", "note": "33", "missing": "31"}


def guarded(probe: Probe) -> Findings:
    """All that `probe` finds; where it breaks, a line that says so instead of the rest."""
    try:
        yield from probe()
    except Exception as error:
        yield Finding(probe.__name__.replace("_", " "), f"cannot be told ({said(error)})", "mend what else is missing")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, each line as soon as it is known; gives the exit status."""
    parser = Parser(prog="python -m megalite.doctor", description=(doctor.__doc__ or "").split(":")[0])
    parser.add_argument("--json", action="store_true", help="the same as JSON, for a bug report")
    as_json = parser.parse_args(argv).json
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    report: dict[str, list[Finding]] = {}
    for title, probes in SECTIONS.items():
        report[title] = []
        if not as_json:
            print(title, flush=True)
        for finding in (finding for probe in probes for finding in guarded(probe)):
            report[title].append(finding)
            if not as_json:
                print(line(finding, coloured), flush=True)
    missing = [finding.name for findings in report.values() for finding in findings if finding.state == "missing"]
    if as_json:
        sections = {title: [asdict(f) | {"state": f.state} for f in findings] for title, findings in report.items()}
        print(json.dumps({"megalite": __version__, "ready": not missing, "sections": sections}, indent=1))
    else:
        gaps = f"missing: {', '.join(missing)}; all at once, in megalite's folder: make install"
        print(f"\n{gaps if missing else 'ready to train: python examples/pretrain_7b.py'}")
    return 1 if missing else 0


def line(finding: Finding, coloured: bool) -> str:
    """A finding for the screen, its remedy below it."""
    state = f"{finding.state:7}"
    state = f"\x1b[{COLOURS[finding.state]}m{state}\x1b[0m" if coloured else state
    text = f"  {state}  {finding.name:15}  {finding.value}"
    return f"{text}\n{'':28}→ {finding.remedy}" if finding.remedy else text


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # whoever read has left, as `head` does; the flush at exit must not complain of it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
