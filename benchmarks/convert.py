"""Peak memory of converting a model of Llama 2 7B's shapes, bf16, to a run folder and back.

    python benchmarks/convert.py      writes results/convert.md

Each direction runs tools/checkpoint.py convert in its own process, whose peak resident memory the kernel reports. Needs
three times the model's 13.5 GB on --disk, and deletes it afterwards.
"""

import argparse
import filecmp
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from megalite.config import parse_command_line, resolve
from megalite.config.shapes import shapes
from megalite.exchange.hf_export import export

ROOT = Path(__file__).resolve().parent.parent


def make(folder: Path, preset: str) -> int:
    """Write a Hugging Face folder with random weights in the preset's shapes; returns its number of parameters."""
    model = resolve(parse_command_line(["--preset", preset], default_preset=None, prog="").config, 1).model
    whole = shapes(model)
    # drawn once and repeated: the values only must not be zero
    noise = torch.randn(2**24).bfloat16()

    def value(name: str) -> torch.Tensor:
        values = torch.empty(torch.Size(whole[name]).numel(), dtype=torch.bfloat16)
        for start in range(0, values.numel(), noise.numel()):
            part = values[start : start + noise.numel()]
            part.copy_(noise[: part.numel()])
        return values.view(whole[name])

    export(folder, model, value, dict.fromkeys(whole, torch.bfloat16), context=4096)
    return sum(torch.Size(shape).numel() for shape in whole.values())


def convert(source: tuple[str, Path], target: tuple[str, Path]) -> tuple[float, float]:
    """(seconds, peak resident GB) of one conversion."""
    command = [sys.executable, ROOT / "tools" / "checkpoint.py", "convert", "--from", *source, "--to", *target]
    began = time.monotonic()
    process = subprocess.Popen([str(word) for word in command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: conversion ended with status {process.returncode}")
    return time.monotonic() - began, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama2-7b")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "convert.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.disk) as name:
        folder = Path(name)
        parameters = make(folder / "hf", options.preset)
        weights = list((folder / "hf").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in weights) / 1e9
        ways = {
            "Hugging Face → megalite": convert(("hf", folder / "hf"), ("megalite", folder / "run")),
            "megalite → Hugging Face": convert(("megalite", folder / "run"), ("hf", folder / "back")),
        }
        files = sorted(file.name for file in (folder / "hf").iterdir())
        _, different, errors = filecmp.cmpfiles(folder / "hf", folder / "back", files, shallow=False)
        if different or errors:
            raise SystemExit(f"error: {different + errors} changed on the way there and back")
    lines = [
        f"# Converting {options.preset}",
        "",
        f"`python benchmarks/convert.py --preset {options.preset}`: {parameters / 1e9:.2f}e9 parameters, bf16, "
        f"{size:.1f} GB in {len(weights)} files; {platform.processor() or platform.machine()}, {os.cpu_count()} "
        f"cores, torch {torch.__version__}.",
        "",
        "| way | seconds | peak resident GB |",
        "|---|---|---|",
        *(f"| {way} | {seconds:.0f} | {peak:.2f} |" for way, (seconds, peak) in ways.items()),
        "",
        "Every file came back byte for byte.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
