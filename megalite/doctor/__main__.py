"""`python -m megalite.doctor`: exit status 0 when training can run here, 1 when something required is missing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from megalite import __version__, doctor
from megalite.doctor import Finding, Findings, machine, one_line, ranks, software
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
    """Yield the probe's findings; if it raises, a finding with the error instead of the rest."""
    try:
        yield from probe()
    except Exception as error:
        value = f"could not be checked ({one_line(error)})"
        yield Finding(probe.__name__.replace("_", " "), value, "fix the other gaps first, then run this again")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, each line as soon as it is known; returns the exit status."""
    parser = Parser(prog="python -m megalite.doctor", description=(doctor.__doc__ or "").split(":")[0])
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for a bug report")
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
        gaps = f"missing: {', '.join(missing)}; to install everything, run make install in megalite's folder"
        print(f"\n{gaps if missing else 'ready to train: python examples/pretrain_7b.py'}")
    return 1 if missing else 0


def line(finding: Finding, coloured: bool) -> str:
    """A finding as text, with its remedy on a second line."""
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
        # the reader has exited, as `head` does; without this the flush at exit would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
