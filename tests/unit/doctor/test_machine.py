"""Python, memory, limits, disk and GPUs: each gap is found and has a remedy."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from megalite.doctor import GIB, machine
from megalite.plan import topology

ROOT = Path(__file__).parents[3]


def test_python_is_the_one_of_the_project() -> None:
    assert f'requires-python = ">={".".join(map(str, machine.PYTHON))}"' in (ROOT / "pyproject.toml").read_text()


def test_an_old_python_is_a_required_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = machine.python()
    assert found.state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    (found,) = machine.python()
    assert found.state == "missing"
    assert "install Python 3.11 or later" in found.remedy


def test_other_systems_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = machine.system()
    assert found.state == "ok"
    monkeypatch.setattr(sys, "platform", "darwin")
    (found,) = machine.system()
    assert "tested on Linux only" in found.remedy


@pytest.mark.parametrize(("free", "state"), [(GIB - 1, "note"), (GIB, "ok")])
def test_memory(monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    monkeypatch.setattr(topology, "available_memory", lambda: free)
    (found,) = machine.memory()
    assert found.state == state
    assert found.value.startswith("1.0 of ")


@pytest.mark.parametrize(
    ("files", "state", "value"),
    [(256, "note", "ulimit -n 256"), (1024, "ok", "ulimit -n 1024"), (-1, "ok", "ulimit -n unlimited")],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, files: int, state: str, value: str) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (files, files))
    monkeypatch.setattr(machine.os.path, "isdir", lambda path: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=GIB // 16))
    shared, found = machine.limits()
    assert (shared.value, shared.state) == ("0.1 GiB", "note")
    assert "--shm-size" in shared.remedy
    assert (found.value, found.state) == (value, state)


@pytest.mark.parametrize(("gib", "writable", "state"), [(3, True, "ok"), (2, True, "note"), (3, False, "note")])
def test_disk(monkeypatch: pytest.MonkeyPatch, gib: int, writable: bool, state: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=gib * GIB))
    monkeypatch.setattr(machine.os, "access", lambda path, mode: writable)
    (found,) = machine.disk()
    assert found.state == state
    assert found.value.startswith(f"{gib}.0 GiB free in ")
    assert ("not writable" in found.value) is not writable


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
    assert second.value == "NVIDIA Future 1, 70.0 of 80.0 GiB free, bf16 peak unknown, so no MFU"
    assert driver.value == "550.54, supports CUDA up to 12.4"
    assert "CUDA 12.4 or older" in built_for.remedy


def test_a_torch_too_new_for_the_driver(fake_nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.torch_cuda("12.4").value == "13.0 does not work with a driver for CUDA 12.4"
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
