"""The control connection from each rank to rank 0, separate from torch.distributed and open for the whole run.

A dead rank closes it, a stopped rank falls silent, a failing rank sends its error. Rank 0 (`Hub`) decides which is the
cause and sends its verdict to all; a thread of each rank then ends its process, even from within a blocking call. Each
rank watches rank 0 for silence itself.
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
    """One rank's connection to rank 0, and the thread that ends this process when the run is over.

    `host`: rank 0's host name. `hub`: on rank 0 alone.
    """

    def __init__(self, here: Place, connection: socket.socket, host: str, timeout_s: float, hub: Hub | None) -> None:
        self.here, self.hub, self.timeout_s = here, hub, timeout_s
        self.host0, self.address = host, connection.getpeername()[0]
        self._silence = min(timeout_s, SILENCE_S)
        # reentrant: a signal handler may send while the main thread is sending
        self._connection, self._sending = connection, threading.RLock()
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._failing, self._speaks = "", threading.Event()
        self._over = False
        connection.settimeout(beat_s(self._silence))
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def gather(self, report: dict[str, Any]) -> list[dict[str, Any]]:
        """Collect one report per rank: on rank 0 all of them in rank order, on other ranks an empty list.

        A report has `node`, `host`, `error` ("" if none) and `printed`, whether the error has been printed already.
        """
        self._send({"report": report})
        return [] if self.hub is None else self.hub.reports.get()

    def share(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        if self.hub is not None:
            self.hub.broadcast({"shared": value})
        return self._inbox.get()

    def accuse(self, rank: int, text: str, reports: Sequence[dict[str, Any]]) -> NoReturn:
        """End the run because of `rank`, which prints `text` itself. Rank 0 only."""
        assert self.hub is not None
        self.hub.accuse(Verdict(rank, reports[rank]["node"], reports[rank]["host"], "error", text))
        self.wait_for_end()

    def failed(self, kind: str, text: str) -> None:
        """Report that this rank has failed. Returns if this rank should print the reason; otherwise the process ends.

        `kind`: one of KINDS.
        """
        if self._over:
            return
        self._failing = kind
        self._send({"ended": [kind, text]})
        # with the connection lost too, the verdict is that rank 0 died; after the timeout this rank prints its error
        self._speaks.wait(SETTLE_S + self._silence + 1.0)

    def leave(self) -> None:
        """Leave the run: this rank has finished and ignores what happens to the others."""
        self._over = True
        self._send({"bye": 1})
        if self.hub is not None:
            self.hub.close()

    def wait_for_end(self) -> NoReturn:
        """Wait for the verdict, which ends this process."""
        time.sleep(self.timeout_s + self._silence)
        end(1)

    def _send(self, message: dict[str, Any]) -> None:
        # if rank 0 died, the listening thread notices and reports it
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
        """End this process, unless its main thread has failed and should print the reason."""
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
            # the failed rank prints its own error if it can; rank 0 repeats it if that rank logs on another node
            speaks = rank == 0 and (verdict.kind == "gone" or verdict.node != 0)
            end_with(verdict.line(), 1, speaks)


def end_with(line: str, status: int, speaks: bool = True) -> NoReturn:
    """Print `line` if `speaks`, and exit from any thread; a silent rank exits later, so that the line is seen first."""
    if line:
        tell_launcher(line)
    if line and speaks:
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)
    else:
        time.sleep(0.5)
    end(status)
