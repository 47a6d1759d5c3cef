"""How ranks connect to rank 0: obstacles are reported, and no rank waits beyond the deadline."""

import os
import socket
import threading
import time

import pytest

from megalite.launch import meet
from megalite.launch.meet import NotMet, join, port_holder
from megalite.launch.place import Place

ALONE = Place(0, 1, 0, 1, "127.0.0.1", 0)


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def test_rank_0_meets_itself() -> None:
    here = Place(0, 1, 0, 1, "127.0.0.1", free_port())
    peers, store = join(here, 10.0, time.monotonic())
    assert store is None
    assert peers.host0 == socket.gethostname()
    assert peers.gather({"error": ""}) == [{"error": ""}]
    assert peers.share("x") == "x"
    peers.leave()
    for thread in threading.enumerate():
        if thread.name in ("peers", "hub"):
            thread.join(10)
            assert not thread.is_alive()


def test_nobody_is_there() -> None:
    here, began = Place(1, 2, 0, 1, "127.0.0.1", free_port()), time.monotonic()
    with pytest.raises(NotMet, match=f"rank 0 did not answer at 127.0.0.1:{here.port} within 1 s") as caught:
        join(here, 1.0, began)
    assert time.monotonic() - began < 2
    assert caught.value.line.startswith(f"error: rank 1 on {socket.gethostname()}: rank 0 did not answer")


def test_one_rank_per_node_prints() -> None:
    assert not NotMet(Place(3, 8, 3, 4), "x").speaks
    assert NotMet(Place(4, 8, 0, 4), "x").speaks
    assert NotMet(Place(1, 8, 1, 4), "x").speaks  # on rank 0's node, where rank 0 may be the one missing


def test_who_comes_late_waits_for_half_as_long() -> None:
    here, began = Place(1, 2, 0, 1, "127.0.0.1", free_port()), time.monotonic()
    with pytest.raises(NotMet):
        join(here, 1.0, began - 100)
    assert 0.4 < time.monotonic() - began < 2


def test_another_program_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meet, "HELLO_S", 0.2)
    monkeypatch.setattr(meet, "STRANGER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        here = Place(1, 2, 1, 2, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(NotMet, match="is not rank 0 of this run: another program uses the port"):
            join(here, 30.0, time.monotonic())


def test_the_port_is_taken() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        assert port_holder(port).startswith(f" (held by pid {os.getpid()}, ")
        with pytest.raises(
            ValueError, match=rf"MASTER_PORT={port} on .*held by pid {os.getpid()}.*; export MASTER_PORT"
        ):
            join(Place(0, 2, 0, 2, "127.0.0.1", port), 5.0, time.monotonic())


def test_the_agent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(meet, "STRANGER_S", 0.3)
    here = Place(0, 2, 0, 2, "127.0.0.1", free_port())
    with pytest.raises(NotMet, match=f"torchrun's store at 127.0.0.1:{here.port} is gone: Connection refused"):
        join(here, 30.0, time.monotonic())


def test_addresses_by_which_other_nodes_may_reach_rank_0() -> None:
    assert meet._addresses(ALONE) == ["127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as store:
        found = meet._addresses(Place(0, 4, 0, 2, "localhost", store.getsockname()[1]))
    assert found[0] == "127.0.0.1"
    assert found[-1] == "localhost"
