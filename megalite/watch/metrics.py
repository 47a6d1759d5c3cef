"""metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run keeps what it wrote.

The same numbers go to TensorBoard where log.tensorboard asks for it.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any


def require_tensorboard() -> None:
    """ValueError where TensorBoard cannot be written: to be told before a run starts, not by it. Imports nothing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "log.tensorboard=true: tensorboard is not installed; pip install 'megalite[log]', or log.tensorboard=false"
        )


class Metrics:
    """Appends to `run_dir/metrics.jsonl`; a rank that does not report gets `run_dir` None and writes nothing.

    `tensorboard`: also to `run_dir/tensorboard`, where what an earlier run wrote after `step` is dropped from view.
    """

    def __init__(self, run_dir: Path | None, *, tensorboard: bool = False, step: int = 0) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a+b") if run_dir else None
        if self._file and self._file.tell():
            self._file.seek(-1, 2)
            if self._file.read(1) != b"\n":
                # a killed run's torn line must not swallow the first of this one
                self._file.write(b"\n")
        self._board: Any = None
        if run_dir and tensorboard:
            require_tensorboard()
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, flush_secs=10)

    def write(self, kind: str, **values: Any) -> None:
        if self._file:
            line = {"kind": kind, "time": round(time.time(), 3), **values}
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        if self._board and kind == "eval":
            self._board.add_scalar(f"eval/{values['name']}", values["loss"], values["step"])
        elif self._board and kind == "train":
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, values["step"])

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


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
