"""`python -m megalite.doctor`: the report, its exit status, and probes that raise."""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.doctor import Finding
from megalite.doctor.__main__ import SECTIONS, guarded, line, main

ROOT = Path(__file__).parents[3]


def test_report_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert [row for row in out.splitlines() if row and not row.startswith(" ")][:-1] == list(SECTIONS)
    assert "\x1b" not in out
    assert re.search(r"^  ok       torch            2\.", out, re.M)
    assert re.search(r"^  ok       rope             cpu fp32 bf16 fp64 fused; cpu fp16 torch", out, re.M)
    assert out.rstrip().endswith("ready to train: python examples/pretrain_7b.py")


def test_report_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    assert list(report["sections"]) == list(SECTIONS)
    found = [finding for findings in report["sections"].values() for finding in findings]
    assert all(f["value"] and (f["state"] == "ok") == (not f["remedy"]) for f in found)
    assert {"Python", "torch", "megalite._C", "attention", "NVIDIA apex", "backends", "disk"} <= {
        f["name"] for f in found
    }


def test_as_a_command_with_a_reader_that_leaves() -> None:
    command = f"{sys.executable} -m megalite.doctor | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "machine\n"
    assert done.stderr == ""


def test_colour_and_alignment() -> None:
    plain = line(Finding("disk", "full", "make room"), False)
    assert plain == "  note     disk             full\n" + " " * 28 + "→ make room"
    assert line(Finding("disk", "full", "make room"), True) == plain.replace("note   ", "\x1b[33mnote   \x1b[0m")
    assert Finding("torch", "", "pip", required=True).state == "missing"
    assert Finding("torch", "2.13", required=True).state == "ok"


def test_a_broken_probe_is_a_line() -> None:
    def host_name() -> Iterator[Finding]:
        yield Finding("first", "found")
        raise PermissionError("no\nway")

    first, broken = guarded(host_name)
    assert first.value == "found"
    assert (broken.name, broken.state) == ("host name", "note")
    assert broken.value == "could not be checked (PermissionError: no)"


@pytest.mark.parametrize(("name", "state", "status"), [("matplotlib", "note", 0), ("safetensors", "missing", 1)])
def test_a_package_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, state: str, status: int
) -> None:
    version = importlib.metadata.version

    def without(package: str) -> str:
        if package == name:
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert main(["--json"]) == status
    report = json.loads(capsys.readouterr().out)
    (found,) = [f for f in report["sections"]["packages"] if f["name"] == name]
    assert found["state"] == state
    assert found["value"].startswith("not installed")
    assert found["remedy"].startswith(f"pip install '{name}>=")
    assert report["ready"] is (status == 0)
