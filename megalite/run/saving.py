"""When a run saves, and what a failed save means for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalite.checkpoint import folder as folders
from megalite.checkpoint.save import SaveFailed, Saver
from megalite.checkpoint.state import State
from megalite.engine.engine import Engine
from megalite.watch.metrics import Metrics
from megalite.watch.progress import Progress


class Saving:
    """The checkpoints of a run, at most one being written, reported as they are completed.

    Every method is collective, and raises SaveFailed, on every rank, if a checkpoint cannot be written. Under
    checkpoint.on_failure=continue it warns instead, unless that checkpoint is the last of the run.
    """

    def __init__(self, engine: Engine, state: State, run_dir: Path, metrics: Metrics, progress: Progress) -> None:
        self.saver = Saver(run_dir, engine.config, engine.mesh)
        self._engine, self._state, self._metrics, self._progress = engine, state, metrics, progress
        self._saved_step = -1

    def save(self, last: bool) -> None:
        """Start writing a checkpoint of this step, unless there is one; wait for it if it is the `last` of the run."""
        self.finish()
        if self._saved_step != self._state.step:
            self._saved_step = self._state.step
            engine = self._engine
            self.saver.start(engine.shards, engine.spans(), engine.state(), dataclasses.asdict(self._state))
        if last or not self._engine.config.checkpoint.async_save:
            self.finish(last)

    def finish(self, last: bool = False) -> None:
        """Wait for the pending save, if any."""
        with self._may_fail(last):
            self._report(self.saver.finish())

    def settle(self, over: float, failed: float) -> None:
        """Advance the pending save by the sums over all ranks of `Saver.progress`."""
        with self._may_fail():
            self._report(self.saver.settle(over, failed))

    def _report(self, folder: Path | None) -> None:
        if folder is not None:
            self._metrics.write("checkpoint", step=folders.step_of(folder), folder=str(folder))
            self._progress.say(f"checkpoint {folder}")

    @contextmanager
    def _may_fail(self, last: bool = False) -> Iterator[None]:
        """Turn a failed save into an error or a warning, by checkpoint.on_failure."""
        try:
            yield
        except SaveFailed as error:
            untouched = "those before it are untouched"
            if last or self._engine.config.checkpoint.on_failure == "stop":
                way = "" if last else ", or set checkpoint.on_failure=continue to train on without it"
                raise SaveFailed(f"{error}; {untouched}. {error.remedy}{way}") from None
            self._metrics.write("checkpoint_failed", step=self._state.step, error=str(error))
            self._progress.say(f"WARNING: {error}; {untouched}, the next try is at the next interval")
