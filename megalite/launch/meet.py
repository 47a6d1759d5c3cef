"""How ranks connect to rank 0: at MASTER_PORT, or under torchrun at the address that rank 0 puts into its store.

Only the store needs torch: without it, ranks report mistakes to each other before torch is imported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalite.launch.hub import HELLO_S, Hub, Lines, encode
from megalite.launch.launcher import launcher_gone
from megalite.launch.peers import Peers, end_with
from megalite.launch.place import Place

SIOCGIFADDR = 0x8915
# another process answering at rank 0's address may belong to a run that is ending: wait this long for it to go away
STRANGER_S = 3.0
# the longest wait for ranks to connect, even if parallel.timeout_s is longer
LONGEST_S = 3600.0


class NotMet(ValueError):
    """This rank cannot connect to rank 0. `line`: for the user; `speaks`: whether this rank prints it."""

    def __init__(self, here: Place, text: str) -> None:
        super().__init__(text)
        self.line, self.speaks = f"error: rank {here.rank} on {socket.gethostname()}: {text}", speaks(here)


def speaks(here: Place) -> bool:
    """Whether this rank prints an error that all ranks except rank 0 see: one rank per node does."""
    return here.local_rank == 0 or here.rank == 1


def served(env: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun's agent provides a store."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def join(here: Place, timeout_s: float, began: float) -> tuple[Peers, Any]:
    """Connect to rank 0; returns the connection, and the agent's store if there is one.

    All ranks must connect within `timeout_s` of `began` (time.monotonic()), the start of this process. A rank that
    arrives late itself, after preparing data, still waits for half of `timeout_s`. Raises NotMet with the reason.
    """
    timeout_s = min(timeout_s, LONGEST_S)
    deadline = max(began + timeout_s, time.monotonic() + timeout_s / 2)
    late = NotMet(here, f"no answer from {here.master}:{here.port} within {timeout_s:g} s (parallel.timeout_s)")
    with _limit(deadline, late):
        if not served():
            token = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')}.{here.world_size}"
            hub = Hub(_listen(here), here.world_size, token, timeout_s, deadline) if here.rank == 0 else None
            address = ("127.0.0.1" if here.rank == 0 else here.master, here.port)
            return Peers(here, *_connect_at_port(here, address, token, deadline, timeout_s), timeout_s, hub), None
        store = _agent_store(here, timeout_s)
        hub = None
        if here.rank == 0:
            listener = _server(0, here)
            token = secrets.token_hex(8)
            hub = Hub(listener, here.world_size, token, timeout_s, deadline)
            found = {"addresses": _addresses(here), "port": listener.getsockname()[1], "token": token}
            store.set("hub", json.dumps(found))
        return Peers(here, *_connect_by_store(here, store, deadline, timeout_s), timeout_s, hub), store


@contextmanager
def _limit(deadline: float, late: NotMet) -> Iterator[None]:
    """End the process one second after `deadline`: a call into a store whose server has stopped never returns."""
    timer = threading.Timer(max(0.0, deadline + 1.0 - time.monotonic()), end_with, (late.line, 1, late.speaks))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _agent_store(here: Place, timeout_s: float) -> Any:
    """The agent's store. It survives a restart of the ranks, so each attempt uses its own key prefix."""
    from datetime import timedelta

    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _wait_for_agent(here)
    try:
        store = dist.TCPStore(
            here.master,
            here.port,
            here.world_size,
            is_master=False,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise NotMet(here, f"cannot reach torchrun's store: {_first_line(error)}") from None
    return dist.PrefixStore(f"megalite/attempt_{attempt}", store)


def _wait_for_agent(here: Place) -> None:
    """Check that the agent still listens: torch's client would retry for minutes if it is gone."""
    patience = time.monotonic() + STRANGER_S
    while True:
        try:
            return socket.create_connection((here.master, here.port), timeout=HELLO_S).close()
        except OSError as error:
            _pause(here, 0.2, patience, f"torchrun's store at {here.master}:{here.port} is gone: {error.strerror}")


def _connect_by_store(here: Place, store: Any, deadline: float, timeout_s: float) -> tuple[socket.socket, str]:
    pause = 0.02
    try:
        while not store.check(["hub"]):
            _pause(here, pause, deadline, f"rank 0 did not start within {timeout_s:g} s (parallel.timeout_s)")
            pause = min(2 * pause, 0.5)
        found = json.loads(store.get("hub"))
    except RuntimeError as error:
        raise NotMet(here, f"torchrun's store is gone: {_first_line(error)}") from None
    patience = min(deadline, time.monotonic() + STRANGER_S)
    while True:
        for address in found["addresses"]:
            connection, answer = _greet(here, (address, found["port"]), found["token"])
            if connection:
                return connection, answer
        if time.monotonic() > patience:
            tried = ", ".join(found["addresses"])
            raise NotMet(here, f"cannot reach rank 0 at port {found['port']} of {tried}: it has exited")
        time.sleep(0.1)


def _connect_at_port(
    here: Place, address: tuple[str, int], token: str, deadline: float, timeout_s: float
) -> tuple[socket.socket, str]:
    stranger_since, where = None, f"{address[0]}:{address[1]}"
    while True:
        connection, answer = _greet(here, address, token)
        if connection:
            return connection, answer
        if answer:
            stranger_since = stranger_since or time.monotonic()
            if time.monotonic() - stranger_since > STRANGER_S:
                raise NotMet(
                    here,
                    f"the process at {where} is not rank 0 of this run: another program uses the port, or rank 0 is "
                    f"stopped; export MASTER_PORT=N with a free port N",
                )
        else:
            stranger_since = None
        _pause(here, 0.1, deadline, f"rank 0 did not answer at {where} within {timeout_s:g} s (parallel.timeout_s)")


def _pause(here: Place, seconds: float, deadline: float, text: str) -> None:
    if launcher_gone():
        raise NotMet(here, "the launcher is gone")
    if time.monotonic() > deadline:
        raise NotMet(here, text)
    time.sleep(seconds)


def _greet(here: Place, address: tuple[str, int], token: str) -> tuple[socket.socket | None, str]:
    """Connect to the hub: (connection, its host), or (None, "a stranger" if something else answers, else "")."""
    try:
        connection = socket.create_connection(address, timeout=HELLO_S / 2)
    except OSError:
        return None, ""
    hello = {"token": token, "rank": here.rank, "node": here.node, "host": socket.gethostname()}
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(HELLO_S)
        connection.sendall(encode(hello))
        # only heartbeats can follow before this rank has reported
        first = Lines().feed(connection.recv(1 << 10))[0]
        if first["welcome"]:
            return connection, first["host"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    connection.close()
    return None, "a stranger"


def _addresses(here: Place) -> list[str]:
    """Addresses of this machine to try in turn: with several networks, the shared one is not known."""
    if here.local_ranks == here.world_size:
        return ["127.0.0.1"]
    found = []
    with contextlib.suppress(OSError), socket.create_connection((here.master, here.port), timeout=HELLO_S) as way:
        found.append(way.getsockname()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]))
    # the launcher's name for this node, which may resolve to another one
    return list(dict.fromkeys([*found, here.master]))


def _server(port: int, here: Place) -> socket.socket:
    if socket.has_dualstack_ipv6():
        both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        return socket.create_server(("", port), backlog=here.world_size, **both)  # type: ignore[arg-type]
    return socket.create_server(("", port), backlog=here.world_size)


def _listen(here: Place) -> socket.socket:
    try:
        return _server(here.port, here)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        holder = port_holder(here.port) if error.errno == errno.EADDRINUSE else ""
        raise ValueError(
            f"rank 0 cannot listen at MASTER_PORT={here.port} on {socket.gethostname()}: {error.strerror}{holder}; "
            f"export MASTER_PORT=N with a free port N"
        ) from None


def port_holder(port: int) -> str:
    """` (held by pid N, NAME)` for the process listening at `port`, "" if unknown; other users' only as root."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            # state 0A is LISTEN
            inodes |= {
                f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port
            }
    for link in map(Path, glob.iglob("/proc/[0-9]*/fd/*") if inodes else ()):
        # processes and descriptors may vanish during the scan
        with contextlib.suppress(OSError):
            if os.readlink(link) in inodes:
                process = link.parents[1]
                return f" (held by pid {process.name}, {(process / 'comm').read_text().strip()})"
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
