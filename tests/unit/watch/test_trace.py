"""The trace of one step is a Chrome trace that names the operations of the block."""

import json
from pathlib import Path

import torch

from megalite.watch.trace import traced


def test_the_block_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with traced(path):
        torch.mm(torch.ones(3, 3), torch.ones(3, 3))
    torch.sin(torch.ones(3))
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::mm" in names
    assert "aten::sin" not in names  # after the block


def test_nothing_is_recorded_without_a_path(tmp_path: Path) -> None:
    with traced(None):
        assert not torch.autograd.profiler._is_profiler_enabled
    assert list(tmp_path.iterdir()) == []
