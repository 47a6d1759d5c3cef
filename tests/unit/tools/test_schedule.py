"""tools/schedule.py as users call it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def tool(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(ROOT / "tools" / "schedule.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")


def test_the_tool() -> None:
    shown = tool("1f1b", "--stages", "4", "--microbatches", "8", "--lowered")
    assert shown.returncode == 0
    assert "bubble    27.27%; 1F1B's (p-1)/(m+p-1) = 27.27%" in shown.stdout
    assert "peak live activations, by rank  4 3 2 1" in shown.stdout
    assert "no deadlock, makespan 33" in shown.stdout
    chunked = tool("interleaved", "--stages", "4", "--microbatches", "8", "--chunks", "2", "--lowered")
    assert "bubble    15.79%; 1F1B's (p-1)/(m+p-1) = 27.27%" in chunked.stdout
    assert "peak live activations, by rank  11 9 7 5" in chunked.stdout
    split = tool("zb-h1", "--stages", "4", "--microbatches", "8", "--backward-cost", "4", "--forward-cost", "2")
    assert "makespan  54\nbubble    11.11%" in split.stdout
    for mistake in (
        ["gpipe", "--stages", "two", "--microbatches", "2"],
        ["forward", "--stages", "2", "--microbatches", "2"],
        ["interleaved", "--stages", "2", "--microbatches", "3", "--chunks", "2"],
        ["interleaved", "--stages", "2", "--microbatches", "4"],
        ["gpipe", "--stages", "2", "--microbatches", "2", "--png", "/no/such/folder/x.png"],
    ):
        refused = tool(*mistake)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
