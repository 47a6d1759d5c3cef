"""The machine: Python, system, CPU, memory, limits, disk, GPUs."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import sys
from pathlib import Path

from megalite.doctor import GIB, Finding, Findings, one_line

PYTHON = (3, 11)


def python() -> Findings:
    wanted = ".".join(map(str, PYTHON))
    remedy = f"install Python {wanted} or later and create a new environment with it"
    value = f"{platform.python_version()}, {sys.executable}"
    yield Finding("Python", value, remedy if sys.version_info[:2] < PYTHON else "", required=True)


def system() -> Findings:
    name = platform.system()
    with contextlib.suppress(OSError):
        name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    remedy = "" if sys.platform == "linux" else "use Linux if you can: megalite is tested on Linux only"
    yield Finding("system", f"{name}, kernel {platform.release()}, {platform.machine()}", remedy)


def cores() -> Findings:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    value, quota = f"{usable} of {os.cpu_count()}", Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (text := quota.read_text().split())[0] != "max":
        value += f", limited to {int(text[0]) / int(text[1]):.1f} cores' time by the container"
    yield Finding("CPU cores", value)


def memory() -> Findings:
    from megalite.plan.topology import available_memory

    total, free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), available_memory()
    remedy = "close other programs or get more memory: one rank of a small model takes 0.5 GiB"
    yield Finding("memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", remedy if free < GIB else "")


def limits() -> Findings:
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        remedy = "in a container, docker run --ipc=host or --shm-size=8g: NCCL needs shared memory"
        yield Finding("/dev/shm", f"{size / GIB:.1f} GiB", remedy if size < GIB else "")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = files == resource.RLIM_INFINITY
    value = f"ulimit -n {'unlimited' if unlimited else files}"
    yield Finding("open files", value, "" if unlimited or files >= 1024 else "ulimit -n 65536")


def disk() -> Findings:
    free, writable = shutil.disk_usage(".").free, os.access(".", os.W_OK)
    value = f"{free / GIB:.1f} GiB free in {os.getcwd()}" + ("" if writable else ", which is not writable")
    remedy = "set train.run_dir and data.cache_dir elsewhere: a checkpoint takes 12 bytes per parameter, 14 in bf16"
    yield Finding("disk", value, "" if writable and free > 2 * GIB else remedy)


def gpus() -> Findings:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:
        remedy = "training runs on the CPU; if the machine has a GPU, check nvidia-smi"
        yield Finding("GPU", f"none ({one_line(error)})", remedy)
        return
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name, room = _text(pynvml.nvmlDeviceGetName(handle)), pynvml.nvmlDeviceGetMemoryInfo(handle)
        value = f"{name}, {room.free / GIB:.1f} of {room.total / GIB:.1f} GiB free{_peak(name)}"
        yield Finding(f"GPU {index}", value)
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    newest = f"{cuda // 1000}.{cuda % 1000 // 10}"
    yield Finding("driver", f"{_text(pynvml.nvmlSystemGetDriverVersion())}, supports CUDA up to {newest}")
    yield torch_cuda(newest)


def _text(found: str | bytes) -> str:
    # older releases of pynvml return bytes
    return found.decode() if isinstance(found, bytes) else found


def _peak(name: str) -> str:
    try:
        from megalite.plan.hardware import peak_flops
    except ImportError:
        return ""  # no torch, which `packages` reports
    peak = peak_flops(name, "bf16")
    return f", bf16 peak {peak / 1e12:.0f} TFLOP/s" if peak else ", bf16 peak unknown, so no MFU"


def torch_cuda(driver: str) -> Finding:
    """Whether torch can use the GPUs; `driver`: the newest CUDA version that the driver supports."""
    import torch

    name, built_for = "torch's CUDA", torch.version.cuda
    if built_for is None:
        remedy = f"install a torch build for CUDA {driver} or older: pytorch.org, Get started"
        return Finding(name, "none: this is a CPU build of torch", remedy)
    if torch.cuda.is_available():
        return Finding(name, f"{built_for}, sees {torch.cuda.device_count()} GPUs")
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return Finding(name, f"{built_for}, GPUs hidden", "unset CUDA_VISIBLE_DEVICES")
    remedy = f"update the driver, or install a torch build for CUDA {driver} or older"
    return Finding(name, f"{built_for} does not work with a driver for CUDA {driver}", remedy)
