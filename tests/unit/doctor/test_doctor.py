"""The report of `python -m megalite.doctor`: each gap has a remedy, and nothing ends it early."""

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megalite.doctor import Finding, machine, ranks, software
from megalite.doctor.__main__ import SECTIONS, guarded, line, main

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that is away, or a cluster's, is not what these tests are about."""
    monkeypatch.setattr(ranks, "addresses", lambda host, timeout_s: ["127.0.0.1"])
    monkeypatch.setattr(ranks.shutil, "which", {"torchrun": "/bin/torchrun"}.get)


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
    assert broken.value == "cannot be told (PermissionError: no)"


# packages


def test_python_is_the_one_of_the_project() -> None:
    assert f'requires-python = ">={".".join(map(str, machine.PYTHON))}"' in (ROOT / "pyproject.toml").read_text()


def test_requirements_of_a_checkout_and_of_an_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkout = software.requirements()
    assert checkout[""]["torch"] == ">=2.9,<2.14"
    assert checkout["plot"] == {"matplotlib": ">=3.8,<4"}
    monkeypatch.setattr(software, "PROJECT", tmp_path / "pyproject.toml")
    installed = ["torch<2.14,>=2.9", "PyYAML<7,>=6", 'matplotlib<4,>=3.8; extra == "plot"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: installed)
    assert software.requirements() == {
        "": {"torch": "<2.14,>=2.9", "pyyaml": "<7,>=6"},
        "plot": {"matplotlib": "<4,>=3.8"},
    }


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.9.0", True),
        ("2.9", True),
        ("2.13.1+cu126", True),
        ("2.14.0", False),
        ("2.14.0a0+git1", False),
        ("2.8.9", False),
        ("10.0", False),
    ],
)
def test_ranges(version: str, fits: bool) -> None:
    assert software.in_range(version, ">=2.9,<2.14") is fits
    assert software.in_range(version, "<2.14, >=2.9") is fits


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


def test_a_package_of_another_version_or_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert software.package("numpy", ">=99", "").value.endswith("is not in >=99")
    (tmp_path / "sentencepiece.py").write_text("raise ImportError('libfoo.so.3: cannot open\\nmore')")
    monkeypatch.delitem(sys.modules, "sentencepiece", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = software.package("sentencepiece", ">=0.2,<0.3", "")
    assert "does not load: ImportError: libfoo.so.3: cannot open" in found.value
    assert found.state == "missing"


def test_without_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megalite._index", None)
    found = {f.name: f for f in software.built()}
    assert found["megalite._C"].value == "built for cpu" or torch.cuda.is_available()
    assert found["megalite._index"].value == "not built: numpy instead"
    assert "pip install --no-build-isolation --no-deps -e ." in found["megalite._index"].remedy
    assert "apt-get install g++" in found["megalite._index"].remedy


# apex


def make_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def apex_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    names = ("apex", "apex.multi_tensor_apply", "amp_C")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def test_apex_absent() -> None:
    (found,) = software.apex()
    assert (found.state, found.value) == ("ok", "absent; megalite does not need it")


def test_the_other_apex_is_named_and_never_imported(apex_folder: Path) -> None:
    make_package(apex_folder, {"apex/__init__.py": "raise SystemExit('imported')", "apex/views.py": ""})
    (found,) = guarded(software.apex)
    assert "the other package of that name (a web toolkit from the package index)" in found.value
    assert str(apex_folder) in found.value
    assert found.remedy.startswith("pip uninstall apex")
    assert "apex" not in sys.modules


def test_nvidias_apex(apex_folder: Path) -> None:
    applier = {"apex/__init__.py": "", "apex/multi_tensor_apply/__init__.py": "multi_tensor_applier = None"}
    make_package(apex_folder, applier)
    (found,) = software.apex()
    assert "without its CUDA part amp_C" in found.value
    make_package(apex_folder, {"amp_C.py": "multi_tensor_l2norm = None"})
    (found,) = software.apex()
    assert "with amp_C and multi_tensor_apply" in found.value
    assert found.state == "ok"


def test_nvidias_apex_that_does_not_load(apex_folder: Path) -> None:
    make_package(apex_folder, {"apex/multi_tensor_apply/__init__.py": "", "amp_C.py": "raise ImportError('libc10.so')"})
    (found,) = guarded(software.apex)
    assert found.value == "cannot be told (ImportError: libc10.so)"


# GPUs


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    room = types.SimpleNamespace(free=70 * 2**30, total=80 * 2**30)
    names = [b"NVIDIA H100 80GB HBM3", "NVIDIA Future 1"]
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=names.__getitem__,
        nvmlDeviceGetMemoryInfo=lambda handle: room,
        nvmlSystemGetDriverVersion=lambda: "550.54",
        nvmlSystemGetCudaDriverVersion=lambda: 12040,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_and_a_torch_without_cuda(fake_nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    first, second, driver, built_for = machine.gpus()
    assert first.value == "NVIDIA H100 80GB HBM3, 70.0 of 80.0 GiB free, bf16 peak 989 TFLOP/s"
    assert second.value == "NVIDIA Future 1, 70.0 of 80.0 GiB free, bf16 peak not known: no MFU"
    assert driver.value == "550.54, for CUDA up to 12.4"
    assert "CUDA 12.4 or older" in built_for.remedy


def test_a_torch_too_new_for_the_driver(fake_nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.torch_cuda("12.4").value == "13.0 does not start under a driver for 12.4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.torch_cuda("12.4").remedy == "unset CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.torch_cuda("12.4").state == "ok"


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (found,) = machine.gpus()
    assert found.value.startswith("none (")
    assert "training runs on the CPU" in found.remedy


# ranks


def test_torchrun_that_is_not_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.shutil, "which", lambda tool: None)
    torchrun, backends = ranks.launchers()
    assert torchrun.remedy.startswith(f"{sys.executable} -m torch.distributed.run")
    assert "gloo (CPU) yes" in backends.value


@pytest.mark.parametrize(
    ("script", "env", "value"),
    [
        ("echo slurm 23.02.7", {}, "srun, slurm 23.02.7, outside a job"),
        (
            "echo slurm 23.02.7",
            {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16"},
            "srun, slurm 23.02.7, in job 17: 2 nodes, 16 tasks",
        ),
        ("echo error >&2; echo 'fatal: no configuration' >&2; exit 1", {}, "srun, but fatal: no configuration"),
    ],
)
def test_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, env: dict[str, str], value: str) -> None:
    monkeypatch.undo()  # of `which`
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\n{script}\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    (found,) = ranks.slurm()
    assert found.value == value


def test_slurm_absent() -> None:
    (found,) = ranks.slurm()
    assert found.value == "not here; torchrun starts the ranks"


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as server:
        monkeypatch.setattr(ranks, "PORT", server.getsockname()[1])
        (found,) = ranks.port()
        assert "--master-port" in found.remedy
    (found,) = ranks.port()
    assert found.state == "ok"


def test_a_host_name_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = ranks.host_name()
    assert found.state == "ok"
    assert "several nodes need a real address" in found.value
    monkeypatch.setattr(ranks, "addresses", lambda host, timeout_s: ["192.0.2.1"])  # of no machine: RFC 5737
    (found,) = ranks.host_name()
    assert "resolves to 192.0.2.1, which is not reached" in found.value
    assert "GLOO_SOCKET_IFNAME" in found.remedy
    monkeypatch.setattr(ranks, "addresses", lambda host, timeout_s: [])
    (found,) = ranks.host_name()
    assert "does not resolve" in found.value


def test_a_slow_name_server_does_not_hold_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of `addresses`
    assert ranks.addresses("localhost", 5.0) == ["127.0.0.1"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(1.0) or [])
    began = time.monotonic()
    assert ranks.addresses("far", 0.05) == []
    assert time.monotonic() - began < 0.8


def test_only_variables_that_matter_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)
    (found,) = ranks.environment()
    assert found.value == "none that matter here"
    for name in ("NCCL_DEBUG", "AWS_SECRET", "RANK", "XCUDA_HOME"):
        monkeypatch.setenv(name, "1")
    (found,) = ranks.environment()
    assert found.value == "NCCL_DEBUG=1 RANK=1"
