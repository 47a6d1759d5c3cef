"""Rank 0's hub without peers: how messages are split, which rank is named, and which cause of several wins."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megalite.launch import hub as module
from megalite.launch.hub import Hub, Lines, Verdict, beat_s, encode

TIMEOUT_S = 30.0


class Rank:
    """A connection to the hub that answers to nothing by itself."""

    def __init__(self, address: tuple[str, int], rank: int) -> None:
        self.connection = socket.create_connection(address, timeout=10)
        self.lines = Lines()
        self.send({"token": "t", "rank": rank, "node": 0, "host": "h"})
        assert self.next("welcome") is True

    def send(self, message: dict[str, Any]) -> None:
        self.connection.sendall(encode(message))

    def next(self, key: str) -> Any:
        """The value of the next message that has `key`."""
        while True:
            for message in self.lines.feed(self.connection.recv(1 << 12)):
                if key in message:
                    return message[key]


Start = Callable[[int], tuple[Hub, list[Rank]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(module, "SETTLE_S", 0.3)
    hubs, ranks = list[Hub](), list[Rank]()

    def make(size: int) -> tuple[Hub, list[Rank]]:
        listener = socket.create_server(("127.0.0.1", 0))
        hubs.append(Hub(listener, size, "t", TIMEOUT_S, time.monotonic() + TIMEOUT_S))
        ranks.extend(Rank(listener.getsockname(), rank) for rank in range(size))
        return hubs[-1], ranks

    yield make
    for hub in hubs:
        hub._over = True
    for rank in ranks:
        rank.connection.close()


def test_messages_are_split_at_newlines_wherever_packets_end() -> None:
    messages: list[dict[str, Any]] = [{"beat": 1}, {"text": "a\nb"}, {"n": 3}]
    stream = b"".join(map(encode, messages))
    for size in (1, 2, 7, len(stream)):
        lines, found = Lines(), []
        for start in range(0, len(stream), size):
            found += lines.feed(stream[start : start + size])
        assert found == messages
    with pytest.raises(ValueError, match="Expecting value"):
        Lines().feed(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize(("silence_s", "seconds"), [(0.5, 0.1), (10.0, 1.0), (600.0, 5.0)])
def test_a_stopped_rank_misses_several_heartbeats(silence_s: float, seconds: float) -> None:
    assert beat_s(silence_s) == seconds


@pytest.mark.parametrize(
    ("verdict", "line"),
    [
        (Verdict(2, 0, "h", "error", "no room"), "error: rank 2 on h: no room"),
        (Verdict(0, 0, "h", "error", "no room"), "error: no room"),
        (Verdict(2, 0, "h", "gone", "rank 2 on h died"), "error: rank 2 on h died"),
        (Verdict(2, 0, "h", "error", ""), ""),
    ],
)
def test_the_line_of_a_verdict(verdict: Verdict, line: str) -> None:
    assert verdict.line() == line


@pytest.mark.parametrize(
    ("causes", "rank", "kind"),
    [
        ([(2, "lost"), (1, "error")], 1, "error"),  # the other rank's connection broke because of the error
        ([(2, "error"), (1, "error")], 1, "error"),
        ([(2, "lost"), (1, "signal")], 1, "signal"),
    ],
)
def test_the_best_explanation_wins(start: Start, causes: list[tuple[int, str]], rank: int, kind: str) -> None:
    _, ranks = start(3)
    for cause, how in causes:
        ranks[cause].send({"ended": [how, "text"]})
    for each in ranks:
        verdict = each.next("verdict")
        assert (verdict["rank"], verdict["kind"]) == (rank, kind)


def test_a_settled_cause_is_not_discussed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, ranks = start(2)
    monkeypatch.setattr(module, "SETTLE_S", 60.0)
    hub.accuse(Verdict(1, 0, "h", "gone", "silent"), settled=True)
    assert ranks[0].next("verdict")["text"] == "silent"


def test_reports_arrive_in_rank_order_and_only_once_complete(start: Start) -> None:
    hub, ranks = start(3)
    for rank in (2, 0):
        ranks[rank].send({"report": {"error": "", "from": rank}})
    time.sleep(0.3)
    assert hub.reports.empty()
    ranks[1].send({"report": {"error": "", "from": 1}})
    assert [each["from"] for each in hub.reports.get(timeout=10)] == [0, 1, 2]


def test_a_second_rank_of_one_number_is_refused(start: Start) -> None:
    hub, _ = start(2)
    with socket.create_connection(hub.listener.getsockname(), timeout=10) as twin:
        twin.sendall(encode({"token": "t", "rank": 1, "node": 0, "host": "h"}))
        assert json.loads(twin.recv(1000).splitlines()[0])["welcome"] is False
