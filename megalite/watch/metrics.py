"""metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run keeps what it wrote."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Metrics:
    """Appends to `run_dir/metrics.jsonl`; a rank that does not report gets `run_dir` None and writes nothing."""

    def __init__(self, run_dir: Path | None) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8") if run_dir else None

    def write(self, kind: str, **values: Any) -> None:
        if self._file:
            line = {"kind": kind, "time": round(time.time(), 3), **values}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_metrics(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """{kind: rows}, of rows with a step the last one written for each step, in order of step.

    A run that was killed and resumed has steps twice; the later ones count. A torn last line is passed over.
    """
    kinds: dict[str, dict[Any, dict[str, Any]]] = {}
    path = run_dir / "metrics.jsonl"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        key = (row["step"], row.get("name")) if "step" in row else number
        kinds.setdefault(row["kind"], {}).pop(key, None)
        kinds[row["kind"]][key] = row
    return {kind: sorted(rows.values(), key=lambda r: r.get("step", 0)) for kind, rows in kinds.items()}
