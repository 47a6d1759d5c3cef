"""Starts and ends the `World` of a process: device, threads, process group."""

from __future__ import annotations

import ctypes
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megalite.config import Config
from megalite.config.schema import MOST_THREADS
from megalite.launch.meet import join
from megalite.launch.peers import Peers
from megalite.launch.place import Place, place
from megalite.parallel.groups import DistWorld, SoloWorld, World


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks: each fresh page costs a fault, 18 times the price of writing it."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 256 * 2**20)
    except (OSError, AttributeError):
        return  # not glibc


def _omp_threads(text: str) -> int:
    """The number of threads in OMP_NUM_THREADS, the outermost level of a list like 4,2. Raises ValueError."""
    found = re.fullmatch(r" *([0-9]{1,9}) *(,[0-9, ]*)?", text)
    if not found or not 1 <= int(found[1]) <= MOST_THREADS:
        raise ValueError(
            f"OMP_NUM_THREADS={text[:80]!r} in the environment is not a number of threads from 1 to {MOST_THREADS}; "
            f"correct it or unset it"
        )
    return int(found[1])


def set_threads(threads: int, local_ranks: int) -> int:
    """Set and return this rank's CPU threads: `threads` if not 0, else OMP_NUM_THREADS, else cores / local ranks.

    OMP_NUM_THREADS=1 under torchrun is ignored: torchrun sets it when the user did not.
    """
    text = os.environ.get("OMP_NUM_THREADS")
    by_user = text is not None and not (text == "1" and "TORCHELASTIC_RUN_ID" in os.environ)
    if not threads:
        cores = len(os.sched_getaffinity(0))
        threads = _omp_threads(text) if by_user and text is not None else max(1, cores // local_ranks)
    torch.set_num_threads(threads)
    return threads


def environment(config: Config) -> dict[str, str]:
    """Facts {what: state} that must agree on all ranks and need torch to find out."""
    found = {"torch": f"is {torch.__version__}"}
    if config.train.device == "auto":
        found["train.device=auto"] = "finds a GPU" if torch.cuda.is_available() else "finds no GPU"
    return found


@contextmanager
def start_world(config: Config, peers: Peers | None = None, agent_store: dist.Store | None = None) -> Iterator[World]:
    """Start the world of this run: gloo on CPU, NCCL on CUDA, no process group for a single rank.

    `peers`, `agent_store`: from `launch.meet.join`, if the ranks are connected already. If the block raises, the world
    is left open and the caller reports to the peers.
    """
    here = place()
    warnings.filterwarnings("ignore", message=".*barrier.*device_id.*")
    cuda = config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", here.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    set_threads(config.train.threads, here.local_ranks)
    if here.world_size == 1:
        yield SoloWorld(device)
        return
    if peers is None:
        peers, agent_store = join(here, config.parallel.timeout_s, time.monotonic())
    timeout = timedelta(seconds=config.parallel.timeout_s)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=agent_store or _own_store(here, peers, timeout),
        rank=here.rank,
        world_size=here.world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    yield DistWorld(device, config.parallel.timeout_s)
    # not after an error: the other ranks would lose their connections before they learn the reason
    dist.destroy_process_group()
    peers.leave()


def _own_store(here: Place, peers: Peers, timeout: timedelta) -> dist.Store:
    """A store served by rank 0, for launchers without an agent store."""
    size = here.world_size
    if here.rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, timeout=timeout, wait_for_workers=False)
        peers.share(store.port)
        return store
    return dist.TCPStore(peers.address, peers.share(None), size, timeout=timeout, wait_for_workers=False)
