"""metrics.jsonl: one JSON object per line, appended without buffering, so that a killed run keeps what it wrote.

With log.tensorboard the same numbers also go to TensorBoard. A failed write does not raise: lines are kept and written
when the disk accepts them again, and `problems` reports it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections import deque
from io import FileIO
from pathlib import Path
from typing import Any

from megalite.watch import disk

# most lines kept in memory while the disk fails: a day of short steps
KEPT_LINES = 100_000


def require_tensorboard() -> None:
    """Raises ValueError if tensorboard is not installed. Imports nothing, so it can run before training starts."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "log.tensorboard=true needs the package tensorboard; pip install 'megalite[log]', or set "
            "log.tensorboard=false"
        )


class Metrics:
    """Appends to `run_dir/metrics.jsonl`; with `run_dir` None, on ranks that do not report, writes nothing.

    `tensorboard`: also write to `run_dir/tensorboard`, hiding what an earlier run wrote after `step`. Raises OSError if
    the file cannot be opened; later write errors are kept for `problems`. `folder_gone`: the folder was removed or
    renamed, and nothing is written until `reopen`.
    """

    def __init__(self, run_dir: Path | None, *, tensorboard: bool = False, step: int = 0) -> None:
        self._run_dir = run_dir
        self._file: FileIO | None = None
        self._board: Any = None
        self._waiting: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._problems: list[tuple[str, bool]] = []
        self._refused = self.folder_gone = False
        if run_dir is None:
            return
        self.reopen()
        if tensorboard:
            require_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def reopen(self) -> None:
        """Open the file again, in a folder made anew."""
        assert self._run_dir is not None
        self._folder = os.stat(self._run_dir)
        self.folder_gone = False
        self._open()

    def write(self, kind: str, **values: Any) -> None:
        """Append a row of `kind`: start, train, eval, ..."""
        if self._run_dir is not None:
            line = {"kind": kind, "time": round(time.time(), 3), **values}
            self._waiting.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._append_waiting(self._run_dir)
        if self._board is not None:
            try:
                self._write_board(kind, values)
            except OSError as error:
                # TensorBoard's writer thread has died; metrics.jsonl still has the numbers
                self._board = None
                reason = disk.reason(error, self._run_dir)
                self._problems.append((f"TensorBoard's curves end here: {reason}. {disk.remedy(error)}", False))

    def problems(self) -> list[tuple[str, bool]]:
        """Return (text, whether it may end the run) for each failure since the last call."""
        found, self._problems = self._problems, []
        return found

    def close(self) -> None:
        self._close_file()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def _append_waiting(self, run_dir: Path) -> None:
        path = run_dir / "metrics.jsonl"
        try:
            if self._moved(path) or self.folder_gone:
                return
            if self._file is None:
                self._open()
            assert self._file is not None
            while self._waiting:
                rest = memoryview(self._waiting[0])
                while rest:  # a full disk accepts part of the line; the next write raises the reason
                    rest = rest[self._file.write(rest) :]
                self._waiting.popleft()
            self._refused = False
        except OSError as error:
            # reopening ends a torn line first
            self._close_file()
            if not self._refused:
                why = error.strerror or error
                self._problems.append((f"{path} cannot be written: {why}. {disk.remedy(error)}", True))
            self._refused = True

    def _moved(self, path: Path) -> bool:
        """Whether the folder was removed or renamed; if only the file was removed, start a new one."""
        try:
            same = os.path.samestat(os.stat(path.parent), self._folder)
        except FileNotFoundError:
            same = False
        if not same and not self.folder_gone:
            self.folder_gone = True
            self._close_file()
            self._problems.append((f"{path.parent} was removed or renamed while the run was writing to it", True))
        if same and self._file is not None and not os.fstat(self._file.fileno()).st_nlink:
            self._close_file()
            self._problems.append((f"{path} was removed while the run was writing to it; a new one is started", False))
        return not same

    def _open(self) -> None:
        assert self._run_dir is not None
        self._close_file()
        file = open(self._run_dir / "metrics.jsonl", "a+b", buffering=0)  # noqa: SIM115 - for the run's whole life
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                # end the torn line of a killed run, so that it does not absorb the next
                file.write(b"\n")
        self._file = file

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _write_board(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "eval":
            self._board.add_scalar(f"eval/{values['name']}", values["loss"], values["step"])
        elif kind == "train":
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, values["step"])


def read_metrics(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Return {kind: rows}, sorted by step.

    A run that was killed and resumed has some steps twice: the last row written counts. Torn lines are skipped.
    """
    kinds: dict[str, dict[Any, dict[str, Any]]] = {}
    path = run_dir / "metrics.jsonl"
    # bytes: a line may be torn in the middle of a character
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else []):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        key = (row["step"], row.get("name")) if "step" in row else number
        kinds.setdefault(row["kind"], {}).pop(key, None)
        kinds[row["kind"]][key] = row
    return {kind: sorted(rows.values(), key=lambda r: r.get("step", 0)) for kind, rows in kinds.items()}
