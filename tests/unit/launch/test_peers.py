"""How a rank ends by rank 0's verdict: which rank prints what, and its status. All ranks are in one process here."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megalite.launch import hub as hubs
from megalite.launch import peers as module
from megalite.launch.hub import Hub, Lines, Verdict, encode
from megalite.launch.peers import Peers
from megalite.launch.place import Place

SIZE = 3


class World:
    """Peers of several ranks in one process; `ended` records what each would have printed and its status."""

    def __init__(self, timeout_s: float) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.hub = Hub(listener, SIZE, "token", timeout_s, time.monotonic() + timeout_s)
        self.connections = [self.connect(rank) for rank in range(SIZE)]
        self.peers: list[Peers] = []
        self.ended: dict[int, tuple[str, int]] = {}
        self.timeout_s = timeout_s

    def connect(self, rank: int, token: str = "token") -> socket.socket:
        connection = socket.create_connection(self.address, timeout=5)
        connection.sendall(encode({"token": token, "rank": rank, "node": rank // 2 * 2, "host": f"host{rank // 2}"}))
        assert Lines().feed(connection.recv(1000))[0]["welcome"] is (token == "token")
        return connection

    def listen(self, *ranks: int) -> None:
        for rank in ranks:
            here = Place(rank, SIZE, rank % 2, 2)
            hub = self.hub if rank == 0 else None
            self.peers.append(Peers(here, self.connections[rank], "host0", self.timeout_s, hub))

    def wait(self, count: int, seconds: float = 10.0) -> dict[int, tuple[str, int]]:
        deadline = time.monotonic() + seconds
        while len(self.ended) < count:
            assert time.monotonic() < deadline, self.ended
            time.sleep(0.01)
        return self.ended


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], World]]:
    monkeypatch.setattr(hubs, "SETTLE_S", 0.2)
    made: list[World] = []

    def make(timeout_s: float = 30.0) -> World:
        made.append(World(timeout_s))
        return made[-1]

    original = Peers._end

    def end(self: Peers, verdict: Verdict) -> None:
        def note(line: str, status: int, speaks: bool = True) -> None:
            made[-1].ended[self.here.rank] = (line if speaks else "", status)
            self._over = True

        monkeypatch.setattr(module, "end_with", note)
        original(self, verdict)

    monkeypatch.setattr(Peers, "_end", end)
    yield make
    # no thread may remain that would end this process with the original function
    for each in made:
        each.hub._over = True
        for peers in each.peers:
            peers._over = True
        for connection in each.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
    for thread in threading.enumerate():
        if thread.name in ("peers", "hub"):
            thread.join(10)
            assert not thread.is_alive()


def report(rank: int, error: str = "") -> dict[str, Any]:
    return {"host": f"host{rank // 2}", "node": rank // 2 * 2, "error": error, "printed": False}


def test_reports_come_together_and_a_value_goes_out(world: Callable[[], World]) -> None:
    ranks = world()
    ranks.listen(0, 1, 2)
    got: list[Any] = [None] * SIZE

    def main(rank: int) -> None:
        reports = ranks.peers[rank].gather(report(rank))
        got[rank] = ([each["host"] for each in reports], ranks.peers[rank].share({"x": 1} if rank == 0 else None))

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert got == [(["host0", "host0", "host1"], {"x": 1}), ([], {"x": 1}), ([], {"x": 1})]
    for each in reversed(ranks.peers):
        each.leave()
    time.sleep(0.5)
    assert ranks.ended == {}


def test_a_rank_that_dies(world: Callable[[], World]) -> None:
    ranks = world()
    ranks.listen(0, 1)
    ranks.connections[2].close()
    line = "error: rank 2 on host1 died without a message: killed, or out of memory (see dmesg there)"
    assert ranks.wait(2) == {0: (line, 1), 1: ("", 1)}


def test_a_rank_that_falls_silent(world: Callable[[float], World]) -> None:
    ranks = world(1.0)
    ranks.hub._deadline = None
    ranks.listen(0, 1)  # rank 2 sends no heartbeats
    line = "error: rank 2 on host1 has been silent for 1 s: stopped, or its machine does not answer"
    assert ranks.wait(2) == {0: (line, 1), 1: ("", 1)}


def test_rank_0_falls_silent_or_dies(world: Callable[[float], World]) -> None:
    ranks = world(1.0)
    ranks.hub._over = True
    ranks.listen(1, 2)
    ended = ranks.wait(2)
    # one rank per node prints it
    line = "error: rank 0 on host0 has been silent for 1 s: stopped, or its machine does not answer"
    assert ended == {1: (line, 1), 2: (line, 1)}


def test_an_error_is_the_cause_of_deaths(world: Callable[[], World]) -> None:
    """The rank with the error prints it, and rank 0 again because the other node may have its own log."""
    ranks = world()
    ranks.listen(0, 1, 2)
    ranks.connections[1].shutdown(socket.SHUT_RDWR)
    ranks.peers[2].failed("error", "no room")  # returns, because this rank prints the error
    assert ranks.wait(2)[0] == ("error: rank 2 on host1: no room", 1)


def test_of_several_errors_the_first_rank_prints(world: Callable[[], World]) -> None:
    ranks = world()
    ranks.listen(0, 1, 2)
    ranks.peers[2]._send({"ended": ["error", "b"]})
    ranks.peers[1].failed("error", "a")
    assert ranks.wait(2) == {0: ("", 1), 2: ("", 1)}


def test_an_error_in_a_report_need_not_wait_for_all(
    world: Callable[[], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "ERROR_S", 0.2)
    ranks = world()
    ranks.listen(0, 1)
    ranks.peers[1].gather(report(1, "no such file"))
    assert ranks.wait(2) == {0: ("", 1), 1: ("error: rank 1 on host0: no such file", 2)}


def test_ranks_that_do_not_report(world: Callable[[float], World]) -> None:
    ranks = world(1.0)
    ranks.listen(0, 1, 2)
    ranks.peers[1].gather(report(1))
    line, status = ranks.wait(3)[0]
    assert line.startswith("error: ranks 0, 2 of 3 not ready after parallel.timeout_s=1 s: check their")
    assert status == 1


def test_strangers_are_ignored(world: Callable[[], World]) -> None:
    ranks = world()
    ranks.listen(0, 1, 2)
    ranks.connect(1, token="of another run").close()
    with socket.create_connection(ranks.address) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with socket.create_connection(ranks.address) as stranger:
        stranger.sendall(encode({"report": report(1, "x")}))
    time.sleep(1.0)
    assert ranks.ended == {}


def test_after_the_end_no_rank_is_missed(world: Callable[[], World]) -> None:
    ranks = world()
    ranks.listen(0, 1, 2)
    ranks.peers[2].leave()
    ranks.connections[2].close()
    ranks.peers[0].leave()
    time.sleep(0.3)
    began = time.monotonic()
    ranks.peers[1].failed("error", "too late to matter")
    assert time.monotonic() - began < 1
    assert ranks.ended == {}
