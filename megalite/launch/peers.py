"""Every rank keeps one connection to rank 0, beside torch.distributed, from before the first collective to the end.

A rank that dies closes it, one that is stopped falls silent, one that fails says why. Rank 0 collects this (`Hub`),
decides which of it is the cause, and tells all; a thread of every rank then ends its process, in whatever call that one
waits. Rank 0's own silence is counted by each rank.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from megalite.launch.hub import DIED, SETTLE_S, SILENCE_S, SILENT, Hub, Lines, Verdict, beat_s, encode
from megalite.launch.launcher import end, tell_launcher
from megalite.launch.place import Place


class Peers:
    """One rank's side: its connection to rank 0, and the thread that ends this process when the run has ended."""

    def __init__(self, here: Place, connection: socket.socket, host: str, timeout_s: float, hub: Hub | None) -> None:
        self.here, self.hub, self.timeout_s = here, hub, timeout_s
        self.host0, self.address = host, connection.getpeername()[0]
        self._silence = min(timeout_s, SILENCE_S)
        # a signal may have the main thread send within a send
        self._connection, self._sending = connection, threading.RLock()
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._failing, self._speaks = "", threading.Event()
        self._over = False
        connection.settimeout(beat_s(self._silence))
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def gather(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank has brought, by rank, on rank 0; on others an empty list.

        A report has `node`, `host`, `error` ('' for none) and `said`, whether the user knows of the error already.
        """
        self._send({"report": report})
        return [] if self.hub is None else self.hub.reports.get()

    def share(self, value: Any) -> Any:
        """The value that rank 0 gives."""
        if self.hub is not None:
            self.hub.broadcast({"shared": value})
        return self._inbox.get()

    def accuse(self, rank: int, text: str, reports: Sequence[dict[str, Any]]) -> NoReturn:
        """On rank 0: end the run for a fault of `rank`, which then says so itself."""
        assert self.hub is not None
        self.hub.accuse(Verdict(rank, reports[rank]["node"], reports[rank]["host"], "error", text))
        self.wait_for_end()

    def failed(self, kind: str, text: str) -> None:
        """Tell all ranks that this one cannot go on. Returns if it is for this rank to say why, else ends the process.

        `kind`: one of KINDS.
        """
        if self._over:
            return
        self._failing = kind
        self._send({"ended": [kind, text]})
        # where the connection is lost too the verdict is that rank 0 is gone; where all fails this rank speaks
        self._speaks.wait(SETTLE_S + self._silence + 1.0)

    def leave(self) -> None:
        """The end of the run: what becomes of the others no longer matters here."""
        self._over = True
        self._send({"bye": 1})
        if self.hub is not None:
            self.hub.close()

    def wait_for_end(self) -> NoReturn:
        """Wait for the verdict, which ends this process."""
        time.sleep(self.timeout_s + self._silence)
        end(1)

    def _send(self, message: dict[str, Any]) -> None:
        # where rank 0 is gone the listening thread finds out and says so
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(encode(message))

    def _listen(self) -> None:
        lines, heard, beaten = Lines(), time.monotonic(), 0.0
        while not self._over:
            try:
                data: bytes | None = self._connection.recv(1 << 16)
            except TimeoutError:
                data = None
            except OSError:
                data = b""
            now = time.monotonic()
            for message in lines.feed(data or b""):
                self._obey(message)
            if data == b"" and not self._over:
                return self._end(self._of_rank_0(DIED))
            heard = now if data else heard
            if now - heard > self._silence:
                return self._end(self._of_rank_0(f"has been silent for {self._silence:g} s: {SILENT}"))
            if now - beaten > beat_s(self._silence):
                beaten = now
                self._send({"beat": 1})

    def _of_rank_0(self, how: str) -> Verdict:
        return Verdict(0, 0, self.host0, "gone", f"rank 0 on {self.host0} {how}")

    def _obey(self, message: dict[str, Any]) -> None:
        if "shared" in message:
            self._inbox.put(message["shared"])
        elif "over" in message:
            self._over = True
            self._speaks.set()
        elif "verdict" in message:
            self._end(Verdict(**message["verdict"]))

    def _end(self, verdict: Verdict) -> None:
        """End this process, unless its main thread has failed and is the one to speak."""
        rank, local_rank = self.here.rank, self.here.local_rank
        mine = verdict.rank == rank
        rank_0_gone = verdict.kind == "gone" and verdict.rank == 0
        if self._failing and (mine or (rank_0_gone and self._failing == "error")):
            self._speaks.set()
        elif mine:
            end_with(verdict.line(), 2)
        elif rank_0_gone:
            end_with(verdict.line(), 1, rank == 1 or local_rank == 0)
        else:
            # said by the rank itself if it can, and where its node has a log of its own once more here
            speaks = rank == 0 and (verdict.kind == "gone" or verdict.node != 0)
            end_with(verdict.line(), 1, speaks)


def end_with(line: str, status: int, speaks: bool = True) -> NoReturn:
    """End this process from any thread; one that does not speak, or said it, waits until the one that does is heard."""
    if line:
        tell_launcher(line)
    if line and speaks:
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(0.5)
    end(status)
