"""From a process that torchrun (or srun) has started to a `World`, and back."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megalite.config import Config
from megalite.parallel.groups import DistWorld, SoloWorld, World
from megalite.place import Place, place


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: fresh pages cost a fault each, 18 times the price of writing them."""
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_top_pad, 256 * 2**20)
    except (OSError, AttributeError):
        return  # not glibc: nothing to tell


def set_threads(threads: int, local_ranks: int) -> int:
    """CPU threads of this rank: `threads`, else what OMP_NUM_THREADS says, else cores / local ranks.

    torchrun sets OMP_NUM_THREADS=1 for its workers where the user did not: that is not a wish.
    """
    asked = os.environ.get("OMP_NUM_THREADS")
    by_user = asked is not None and not (asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ)
    if not threads:
        cores = len(os.sched_getaffinity(0))
        threads = int(asked) if by_user and asked is not None else max(1, cores // local_ranks)
    torch.set_num_threads(threads)
    return threads


class Echo(RuntimeError):
    """Another rank failed before this one, and says why."""


@contextmanager
def start_world(config: Config) -> Iterator[World]:
    """The world of this run: gloo on CPU, NCCL on CUDA, no process group at all for one rank.

    When ranks fail the first one's exception is its own, the others' is an Echo.
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
    timeout = timedelta(seconds=config.parallel.timeout_s)
    store = _store(here, timeout)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=here.rank,
        world_size=here.world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    try:
        yield DistWorld(device, config.parallel.timeout_s)
    except Exception as error:
        if not _first_to_fail(store):
            raise Echo from error
        raise
    finally:
        dist.destroy_process_group()


def _first_to_fail(store: dist.Store) -> bool:
    # asked before the connections close, by which the others learn of it
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:
        return True  # whoever served the store is gone, and cannot say anything


def _store(here: Place, timeout: timedelta) -> dist.Store:
    """Where ranks find each other: at torchrun's agent, or at rank 0 where no agent serves.

    After a restart the agent's store still holds the dead ranks' addresses: each attempt gets a name space of its own.
    A store of rank 0 is always new, and must not be divided: agents of several nodes may count restarts differently.
    """
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if served else "0"
    tcp = dist.TCPStore(
        here.master,
        here.port,
        here.world_size,
        is_master=not served and here.rank == 0,
        timeout=timeout,
        multi_tenant=True,
    )
    return dist.PrefixStore(f"megalite/attempt_{attempt}", tcp)
