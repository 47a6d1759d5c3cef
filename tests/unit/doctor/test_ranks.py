"""Launcher, backends, SLURM, port, host name and variables: each gap is found and has a remedy."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from megalite.doctor import ranks


def test_torchrun_that_is_not_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.shutil, "which", lambda tool: None)
    torchrun, backends = ranks.launchers()
    assert torchrun.remedy.endswith(f"{sys.executable} -m torch.distributed.run")
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
    assert found.value == "not installed; use torchrun"


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
    assert "resolves to 192.0.2.1, which is unreachable" in found.value
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


def test_only_variables_that_affect_a_run_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        monkeypatch.delenv(name)
    (found,) = ranks.environment()
    assert found.value == "none that affect a run"
    for name in ("NCCL_DEBUG", "AWS_SECRET", "RANK", "XCUDA_HOME"):
        monkeypatch.setenv(name, "1")
    (found,) = ranks.environment()
    assert found.value == "NCCL_DEBUG=1 RANK=1"
