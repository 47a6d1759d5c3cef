"""Requirements of multi-rank runs: launcher, backends, SLURM, port, host name, environment variables."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

from megalite.doctor import Finding, Findings, one_line

VARIABLES = re.compile(r"(NCCL|GLOO|TORCH|CUDA|OMP|MASTER|MEGALITE)_\w+|RANK|WORLD_SIZE|LOCAL_RANK")
# torchrun's default
PORT = 29500


def launchers() -> Findings:
    path = shutil.which("torchrun")
    remedy = f"activate the environment, or use {sys.executable} -m torch.distributed.run"
    yield Finding("torchrun", path or "not on PATH", "" if path else remedy)
    import torch.distributed as dist

    gloo = dist.is_available() and dist.is_gloo_available()
    nccl = dist.is_available() and dist.is_nccl_available()
    value = f"gloo (CPU) {'yes' if gloo else 'no'}, NCCL (GPU) {'yes' if nccl else 'no'}"
    yield Finding("backends", value, "" if gloo else "install a torch with gloo: without it a CPU run has one rank")


def slurm() -> Findings:
    tools = [tool for tool in ("sbatch", "srun") if shutil.which(tool)]
    if not tools:
        yield Finding("SLURM", "not installed; use torchrun")
        return
    version = subprocess.run([tools[-1], "--version"], capture_output=True, text=True, timeout=2, check=False)
    env, value = os.environ, f"{' and '.join(tools)}, {version.stdout.strip()}"
    if version.returncode:
        reason = (version.stderr.strip() or f"exit status {version.returncode}").splitlines()[-1]
        yield Finding("SLURM", f"{' and '.join(tools)}, but {reason}", "on a cluster node, ask the administrator")
    elif "SLURM_JOB_ID" in env:
        nodes, tasks = env.get("SLURM_JOB_NUM_NODES", "?"), env.get("SLURM_NTASKS", "?")
        yield Finding("SLURM", f"{value}, in job {env['SLURM_JOB_ID']}: {nodes} nodes, {tasks} tasks")
    else:
        yield Finding("SLURM", f"{value}, outside a job")


def port() -> Findings:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", PORT))
        except OSError as error:
            remedy = "use torchrun --standalone on one machine, else --master-port with another number"
            yield Finding("port", f"{PORT}, torchrun's default: {error.strerror}", remedy)
        else:
            yield Finding("port", f"{PORT}, torchrun's default, is free")


def host_name() -> Findings:
    """Whether the host name resolves to this machine: ranks connect to each other by host name."""
    host, found = socket.gethostname(), addresses(socket.gethostname(), timeout_s=1.0)
    remedy = f"add {host} to /etc/hosts, or export MASTER_ADDR=ADDRESS and GLOO_SOCKET_IFNAME=INTERFACE (see: ip addr)"
    if not found:
        yield Finding("host name", f"{host} does not resolve within 1 s", remedy)
        return
    try:
        with socket.create_server((found[0], 0)) as server:
            socket.create_connection(server.getsockname(), timeout=1.0).close()
    except OSError as error:
        yield Finding("host name", f"{host} resolves to {found[0]}, which is unreachable ({one_line(error)})", remedy)
        return
    local = " (this machine only: several nodes need a real address)" if found[0].startswith("127.") else ""
    yield Finding("host name", f"{host} resolves to {', '.join(found)}{local}")


def addresses(host: str, timeout_s: float) -> list[str]:
    """The IPv4 addresses of `host`; empty if it does not resolve within `timeout_s`."""
    found: list[str] = []

    def look() -> None:
        with contextlib.suppress(OSError):
            found.extend(sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, socket.AF_INET)}))

    # the resolver has no timeout of its own: without a name server it would block the report for half a minute
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return list(found)


def environment() -> Findings:
    values = [f"{name}={value}" for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)]
    yield Finding("variables", " ".join(values) or "none that affect a run")
