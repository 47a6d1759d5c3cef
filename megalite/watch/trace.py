"""The event trace of one step, for Perfetto: schedule actions, collectives and kernels with their times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Record the block and write it to `path` in Chrome's trace format; None: record nothing."""
    if path is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile, supported_activities

    activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    with profile(activities=list(activities)) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
