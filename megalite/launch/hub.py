"""Rank 0's side of the control connections: collects reports, deaths and errors, and decides why the run ends."""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

# One fault causes several lost connections at once: rank 0 waits this long for a better explanation.
SETTLE_S = 1.0
# Heartbeats distinguish a slow rank from a stopped one, so silence is never tolerated longer than this.
SILENCE_S = 600.0
# From the best explanation to the worst: a rank's own error, its death, a signal, a lost connection to another rank.
KINDS = ("error", "gone", "signal", "lost")
# After the first error report the other ranks, which usually fail the same way, have this long to report.
ERROR_S = 30.0
HELLO_S = 5.0


@dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    `rank`: the rank that caused it, -1 if ranks never connected. `node`: the first rank on its node. `kind`: one of
    KINDS.
    """

    rank: int
    node: int
    host: str
    kind: str
    text: str

    def line(self) -> str:
        """The line for the user. Rank 0 is not named: its errors are usually common to all ranks."""
        where = f"rank {self.rank} on {self.host}: " if self.kind != "gone" and self.rank > 0 else ""
        return f"error: {where}{self.text}" if self.text else ""


DIED = "died without a message: killed, or out of memory (see dmesg there)"
SILENT = "stopped, or its machine does not answer"


def encode(message: dict[str, Any]) -> bytes:
    """One message as a line of JSON."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Lines:
    """Splits the bytes received from a socket into messages, one JSON object per line."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Return the messages completed by `data`. Raises ValueError if one is not JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines if line]


def beat_s(silence_s: float) -> float:
    """Seconds between heartbeats, for ranks that count as stopped after `silence_s`."""
    return min(max(silence_s / 10, 0.1), 5.0)


class Member:
    """Rank 0's view of one rank."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.lines = connection, Lines()
        self.heard = time.monotonic()
        self.rank = self.node = -1
        self.host, self.left = "", False

    def send(self, data: bytes) -> None:
        # a dead rank is noticed by its closed connection, a stopped one by its silence
        with contextlib.suppress(OSError):
            self.connection.sendall(data)


class Hub:
    """The thread on rank 0 that listens to all ranks.

    `token`: what a rank of this run sends first. `timeout_s`: parallel.timeout_s. `deadline`: the time
    (time.monotonic) by which all ranks must have connected and reported.
    """

    def __init__(self, listener: socket.socket, size: int, token: str, timeout_s: float, deadline: float) -> None:
        self.listener, self.size, self.token, self.timeout_s = listener, size, token, timeout_s
        self.reports: queue.Queue[list[dict[str, Any]]] = queue.Queue()
        self._silence = min(timeout_s, SILENCE_S)
        self._members: dict[int, Member] = {}
        self._round: dict[int, dict[str, Any]] = {}
        self._deadline: float | None = deadline
        self._causes: list[Verdict] = []
        self._since = self._beaten = time.monotonic()
        self._over = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        threading.Thread(target=self._run, name="hub", daemon=True).start()

    def broadcast(self, message: dict[str, Any]) -> None:
        """Send to every rank, to rank 0 last: the message may end this process."""
        for _, member in sorted(self._members.items(), reverse=True):
            if not member.left:
                member.send(encode(message))

    def close(self) -> None:
        """Stop watching: rank 0 has finished the run."""
        self._over = True
        self.broadcast({"over": 1})

    def accuse(self, verdict: Verdict, settled: bool = False) -> None:
        """Record a reason to end the run; with `settled`, end it without waiting for a better one."""
        if settled:
            self._since = 0.0
        elif not self._causes:
            self._since = time.monotonic()
        self._causes.append(verdict)

    def _run(self) -> None:
        while not self._over:
            for key, _ in self._selector.select(min(beat_s(self._silence), 0.2)):
                if key.fileobj is self.listener:
                    self._accept()
                else:
                    self._read(key.data)
            # read first, then look for silent ranks: this process may have been stopped itself
            self._check(time.monotonic())

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            return
        connection.settimeout(HELLO_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        member = Member(connection)
        self._selector.register(connection, selectors.EVENT_READ, member)

    def _read(self, member: Member) -> None:
        try:
            data = member.connection.recv(1 << 16)
            messages = member.lines.feed(data)
        except (OSError, ValueError):
            data, messages = b"", []
        member.heard = time.monotonic()
        for message in messages:
            self._obey(member, message)
        if not data:
            self._selector.unregister(member.connection)
            member.connection.close()
            if member.rank >= 0 and not member.left:
                self._gone(member, DIED)
            member.left = True

    def _obey(self, member: Member, message: dict[str, Any]) -> None:
        if "token" in message:
            welcome = message["token"] == self.token and message["rank"] not in self._members
            member.send(encode({"welcome": welcome, "host": socket.gethostname()}))
            if welcome:
                member.rank, member.node, member.host = message["rank"], message["node"], message["host"]
                self._members[member.rank] = member
        elif member.rank < 0:
            return
        elif "report" in message:
            if not self._round and len(self._members) == self.size:
                self._deadline = time.monotonic() + self.timeout_s
            self._round[member.rank] = message["report"]
            if message["report"]["error"] and self._deadline is not None:
                self._deadline = min(self._deadline, time.monotonic() + ERROR_S)
            if len(self._round) == self.size:
                self.reports.put([self._round[rank] for rank in range(self.size)])
                self._round, self._deadline = {}, None
        elif "ended" in message:
            kind, text = message["ended"]
            self.accuse(self._verdict(member, kind, text))
        elif "bye" in message:
            member.left = True

    def _gone(self, member: Member, how: str, settled: bool = False) -> None:
        self.accuse(self._verdict(member, "gone", f"rank {member.rank} on {member.host} {how}"), settled)

    @staticmethod
    def _verdict(member: Member, kind: str, text: str) -> Verdict:
        return Verdict(member.rank, member.node, member.host, kind, text)

    def _check(self, now: float) -> None:
        if now - self._beaten > beat_s(self._silence):
            self._beaten = now
            self.broadcast({"beat": 1})
        for member in self._members.values():
            if not member.left and now - member.heard > self._silence:
                self._gone(member, f"has been silent for {self._silence:g} s: {SILENT}", settled=True)
                member.left = True
        if self._deadline is not None and now > self._deadline and not self._causes:
            failed = [rank for rank, report in sorted(self._round.items()) if report["error"]]
            if failed:
                report, member = self._round[failed[0]], self._members[failed[0]]
                text = "" if report["printed"] else report["error"]
                return self.accuse(self._verdict(member, "error", text), settled=True)
            missing = [str(rank) for rank in range(self.size) if rank not in self._round]
            text = (
                f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(missing[:8])}{' ...' * (len(missing) > 8)} of "
                f"{self.size} not ready after parallel.timeout_s={self.timeout_s:g} s: check their output and their "
                f"launcher's; if they are still preparing data, prepare it beforehand or raise parallel.timeout_s"
            )
            self.accuse(Verdict(-1, -1, "", "gone", text), settled=True)
        if self._causes and now - self._since > SETTLE_S:
            cause = min(self._causes, key=lambda each: (KINDS.index(each.kind), each.rank))
            self.broadcast({"verdict": asdict(cause)})
            self._over = True
