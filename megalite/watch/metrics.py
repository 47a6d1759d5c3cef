"""metrics.jsonl: one JSON object a line, appended at once, so that a killed run keeps what it wrote.

The same numbers go to TensorBoard where log.tensorboard asks for it. A disk that refuses does not end the run here:
lines are kept and written when it takes them again, and `news` tells of it.
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

# lines kept of a disk that refuses them: a day of short steps
KEPT_LINES = 100_000


def require_tensorboard() -> None:
    """ValueError where TensorBoard cannot be written: to be told before a run starts, not by it. Imports nothing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "log.tensorboard=true: tensorboard is not installed; pip install 'megalite[log]', or log.tensorboard=false"
        )


class Metrics:
    """Appends to `run_dir/metrics.jsonl`; a rank that does not report gets `run_dir` None and writes nothing.

    `tensorboard`: also to `run_dir/tensorboard`, where what an earlier run wrote after `step` is dropped from view.
    OSError where the file cannot be opened; later the disk may refuse. `folder_gone`: the folder that was opened is no
    longer at its place, and nothing is written until `reopen`.
    """

    def __init__(self, run_dir: Path | None, *, tensorboard: bool = False, step: int = 0) -> None:
        self._run_dir = run_dir
        self._file: FileIO | None = None
        self._board: Any = None
        self._waiting: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._news: list[tuple[str, bool]] = []
        self._refused = self.folder_gone = False
        if run_dir is None:
            return
        self.reopen()
        if tensorboard:
            require_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def reopen(self) -> None:
        """Open the file of the folder that is there now."""
        assert self._run_dir is not None
        self._folder = os.stat(self._run_dir)
        self.folder_gone = False
        self._open()

    def write(self, kind: str, **values: Any) -> None:
        if self._run_dir is not None:
            line = {"kind": kind, "time": round(time.time(), 3), **values}
            self._waiting.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._append_waiting(self._run_dir)
        if self._board is not None:
            try:
                self._write_board(kind, values)
            except OSError as error:
                # its thread is dead; metrics.jsonl has the numbers
                self._board = None
                reason = disk.reason(error, self._run_dir)
                self._news.append((f"TensorBoard's curves end here: {reason}. {disk.remedy(error)}", False))

    def news(self) -> list[tuple[str, bool]]:
        """What went wrong since this was asked last, each with whether it may end the run."""
        found, self._news = self._news, []
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
                while rest:  # what a full disk takes is less than the line; the next try says why
                    rest = rest[self._file.write(rest) :]
                self._waiting.popleft()
            self._refused = False
        except OSError as error:
            # opened again a torn line is ended first
            self._close_file()
            if not self._refused:
                why = error.strerror or error
                self._news.append((f"{path} cannot be written: {why}. {disk.remedy(error)}", True))
            self._refused = True

    def _moved(self, path: Path) -> bool:
        """Whether the folder is gone; a file that alone is gone is made again."""
        try:
            same = os.path.samestat(os.stat(path.parent), self._folder)
        except FileNotFoundError:
            same = False
        if not same and not self.folder_gone:
            self.folder_gone = True
            self._close_file()
            self._news.append((f"{path.parent} was removed or renamed while the run was writing to it", True))
        if same and self._file is not None and not os.fstat(self._file.fileno()).st_nlink:
            self._close_file()
            self._news.append((f"{path} was removed while the run was writing to it; a new one is begun", False))
        return not same

    def _open(self) -> None:
        assert self._run_dir is not None
        self._close_file()
        file = open(self._run_dir / "metrics.jsonl", "a+b", buffering=0)  # noqa: SIM115 - for the run's whole life
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                # a killed run's torn line must not swallow the first of this one
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
    """{kind: rows}, of rows with a step the last one written for each step, in order of step.

    A run that was killed and resumed has steps twice; the later ones count. A torn line is passed over.
    """
    kinds: dict[str, dict[Any, dict[str, Any]]] = {}
    path = run_dir / "metrics.jsonl"
    # bytes: a line may be torn within a character
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else []):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        key = (row["step"], row.get("name")) if "step" in row else number
        kinds.setdefault(row["kind"], {}).pop(key, None)
        kinds[row["kind"]][key] = row
    return {kind: sorted(rows.values(), key=lambda r: r.get("step", 0)) for kind, rows in kinds.items()}
