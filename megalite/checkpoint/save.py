"""Save a checkpoint: every rank writes its own blocks, in a thread or at once; then rank 0 publishes them."""

from __future__ import annotations

import errno
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.blocks import Part, parts_of
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import building_folder, step_folder
from megalite.checkpoint.manifest import Damaged
from megalite.checkpoint.publish import missing_parts, point_at, prune, publish, write_rank
from megalite.config import Config
from megalite.launch import launcher
from megalite.parallel.cuts import Shard, uncut
from megalite.parallel.groups import share_text
from megalite.parallel.mesh import Mesh
from megalite.watch import disk

# seconds between rank 0's looks for the other ranks' parts, at most; seconds until a shared file system must show them
LOOK_S, SHOW_S = 0.5, 30.0


class SaveFailed(OSError):
    """A checkpoint could not be written. The message names rank and reason; `remedy` says what to do."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class Saver:
    """One rank's side of the saves of a run. All ranks must call `start`, `settle` and `finish` in the same order.

    Every rank writes its blocks and then a small file, its part. When rank 0 sees the parts of all ranks it publishes
    the checkpoint and removes old ones. With checkpoint.async_save this happens in threads that communicate through the
    run folder only, so a checkpoint is published as soon as it is written, however long the current step takes. Ranks
    learn that a save has ended or failed from `progress`: two numbers that the caller sums over all ranks together with
    those of a step.
    """

    def __init__(self, run_dir: Path, config: Config, mesh: Mesh) -> None:
        self.run_dir, self.config, self.mesh = run_dir, config, mesh
        self._faults = Faults(mesh.world.rank)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saving = False
        # set by this rank: its part has been written, its publishing has ended (or either has failed)
        self._written, self._published = threading.Event(), threading.Event()
        # set for the thread: all ranks have written their parts, stop waiting for parts
        self._all_written, self._leave = threading.Event(), threading.Event()
        self._state: dict[str, Any] = {}
        self._final = self._building = run_dir
        self._outcome = ""

    def start(
        self,
        shards: dict[str, Shard],
        spans: Mapping[str, range],
        kinds: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
    ) -> None:
        """Start a save; arguments as in `save`. With async_save, returns once the tensors are copied to host memory."""
        assert not self._saving
        self._state, self._final = state, step_folder(self.run_dir, state["step"])
        self._building = building_folder(self._final)
        owned = list(own_parts(shards, spans, kinds))
        parts = [part for part, _ in owned]
        need = torch.tensor([float(sum(part.bytes for part in parts))], dtype=torch.float64, device=self.mesh.device)
        total = int(self.mesh.world.all_reduce(need))
        views: Iterable[Tensor] = (view for _, view in owned)
        self._saving, self._error, self._outcome = True, None, f"cannot write the checkpoint of step {state['step']}"
        for event in (self._written, self._published, self._all_written, self._leave):
            event.clear()
        if not self.config.checkpoint.async_save:
            self._write(parts, views, total)
            return
        views = [view.to("cpu", copy=True) for view in views]

        def work() -> None:
            self._write(parts, views, total)
            if self.mesh.world.rank == 0 and self._error is None:
                self._publish()

        self._thread = threading.Thread(target=work, name=launcher.SAVER, daemon=True)
        self._thread.start()

    def progress(self) -> tuple[float, float]:
        """Two numbers to sum for `settle`: 1 with this rank's part written, 2 with the save published; 1 on failure."""
        finished = self._written.is_set() + self._published.is_set()
        return float(finished), float(finished > 0 and self._error is not None)

    def settle(self, finished: float, failed: float) -> Path | None:
        """Act on the sums of `progress` over all ranks. Returns the checkpoint's folder if the save has ended.

        Raises SaveFailed, the same on every rank, if a rank could not write; the half-written folder is then removed.
        """
        if not self._saving or finished < self.mesh.world.size:
            return None
        if failed:
            self._fail()
        if finished > self.mesh.world.size:
            self.close()
            self._reset()
            return self._final
        self._all_written.set()
        if self._thread is None and self.mesh.world.rank == 0:
            self._publish()
        return None

    def finish(self) -> Path | None:
        """Wait for the pending save, if any, and settle it. Raises SaveFailed as `settle`. Collective."""
        final = None
        while self._saving:
            self._written.wait()
            if self._all_written.is_set() and self._thread is not None:
                self._thread.join()
            sums = torch.tensor(self.progress(), dtype=torch.float64, device=self.mesh.device)
            finished, failed = self.mesh.world.all_reduce(sums).tolist()
            final = self.settle(finished, failed)
        return final

    def close(self) -> None:
        """Wait for this rank's thread. It finishes its writes, and publishes the save if all ranks have written."""
        self._leave.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _reset(self) -> None:
        self._saving = False
        self._written.clear()
        self._published.clear()

    @contextmanager
    def _recording(self, finished: threading.Event) -> Iterator[None]:
        """Keep an exception for `settle`, and set `finished` in any case."""
        try:
            yield
        except BaseException as error:
            self._error = error
        finally:
            finished.set()

    def _write(self, parts: list[Part], views: Iterable[Tensor], total: int) -> None:
        with self._recording(self._written):
            parent = self._building.parent
            parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(parent).free
            if total > free:
                raise OSError(errno.ENOSPC, f"it needs {total:,} bytes, {free:,} are free", str(parent))
            write_rank(self._building, self.mesh.world.rank, parts, views, self._faults)

    def _publish(self) -> None:
        c = self.config.checkpoint
        with self._recording(self._published):
            if not self._wait_for_parts():
                return
            publish(self._building, self._final, self.config, self._state, self._faults)
            self._outcome = f"has written the checkpoint of step {self._state['step']} and cannot remove an older one"
            point_at(self._final, self._faults)
            prune(self._final, c.keep, c.keep_every, self._faults)

    def _wait_for_parts(self) -> bool:
        """Wait until every rank's part exists. Returns False if `close` is called, or the run ends, before that."""
        ranks, deadline, pause = self.mesh.world.size, math.inf, LOOK_S / 100
        while missing := missing_parts(self._building, ranks):
            if self._all_written.is_set() and deadline == math.inf:
                deadline = time.monotonic() + min(SHOW_S, self.config.parallel.timeout_s / 3)
            if time.monotonic() > deadline:
                raise PartsMissing(
                    f"rank {', '.join(map(str, missing))} of {ranks} has written its part, but rank 0 does not see it "
                    f"in {self._building.parent}"
                )
            if self._leave.wait(pause) or launcher.ending:
                return not missing_parts(self._building, ranks)
            pause = min(1.5 * pause, LOOK_S)
        return True

    def _fail(self) -> None:
        """Raise SaveFailed on every rank. All ranks call this, and none is writing any more."""
        self.close()
        error, self._error = self._error, None
        self._reset()
        if self.mesh.world.rank == 0:
            shutil.rmtree(self._building, ignore_errors=True)
        what = f"rank {self.mesh.world.rank} {self._outcome}: "
        text = None
        if isinstance(error, OSError):
            text = f"{what}{disk.reason(error)}\n{disk.remedy(error)}"
        elif isinstance(error, PartsMissing):
            text = f"{what}{error}\nPut train.run_dir on a file system that all nodes share"
        elif isinstance(error, Damaged):
            text = f"{what}{error}\nKeep other processes out of the run folder"
        elif error is not None:
            text = f"{type(error).__name__} {error}"
        text = share_text(self.mesh.world, text, self.mesh.device)
        if error is not None and not isinstance(error, (OSError, PartsMissing, Damaged)):
            raise error
        assert text is not None  # settle calls this only if some rank has failed
        raise SaveFailed(*text.split("\n", 1))


class PartsMissing(Exception):
    """Rank 0 does not see the parts of other ranks."""


def save(
    run_dir: Path,
    config: Config,
    mesh: Mesh,
    shards: dict[str, Shard],
    spans: Mapping[str, range],
    kinds: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
) -> Path:
    """Write a checkpoint of `kinds` ({"weight": {name: tensor}, "exp_avg": …}). Returns its folder. Collective.

    A tensor is a rank's whole local one, or the part `spans[name]` of it, flattened. `spans`: for each parameter the
    range of elements of the flattened local tensor that this rank stores, as far as it owns them. `state`: the
    counters, as plain values. Raises SaveFailed if a rank cannot write; older checkpoints are then unchanged.
    """
    saver = Saver(run_dir, config, mesh)
    saver.start(shards, spans, kinds, state)
    final = saver.finish()
    assert final is not None
    return final


def own_parts(
    shards: dict[str, Shard], spans: Mapping[str, range], kinds: dict[str, dict[str, Tensor]]
) -> Iterator[tuple[Part, Tensor]]:
    """Yield what this rank writes: each part, and a view of its values."""
    for kind, tensors in kinds.items():
        for name, tensor in tensors.items():
            if name not in spans:
                continue
            shard, span = shards[name], spans[name]
            first = shard.held(tensor, span).start
            for part in parts_of(f"{kind}.{name}", shard.whole_shape, tensor.dtype, shard.blocks(span)):
                yield part, shard.view(tensor.detach(), part.block, first)


def write_whole(
    folder: Path,
    config: Config,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    get: Callable[[str], Tensor],
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint `folder` from one process, calling `get(full name)` for one tensor at a time.

    `tensors`: dtype and shape by full name, as weight.embed.weight. `state` as in `save`. Memory: the largest tensor
    and one block. Raises ValueError if the folder exists, or a tensor has another dtype or shape; nothing is then left.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; name a new folder")
    parts = [
        part
        for full, (dtype, shape) in tensors.items()
        for part in parts_of(full, shape, dtype, uncut(shape, 0).blocks())
    ]

    def values() -> Iterator[Tensor]:
        name, whole = "", torch.empty(0)
        for part in parts:
            if part.full != name:
                del whole  # before the next one is read
                name, whole = part.full, get(part.full)
                found, announced = (whole.dtype, tuple(whole.shape)), tensors[name]
                if found != (announced[0], tuple(announced[1])):
                    raise ValueError(f"tensor {name} is {found}, expected {announced}")
            yield whole[tuple(slice(a, a + n) for a, n in zip(part.block.start, part.block.size))]

    building, faults = building_folder(folder), Faults(0)
    shutil.rmtree(building, ignore_errors=True)
    try:
        write_rank(building, 0, parts, values(), faults)
        publish(building, folder, config, state, faults)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return folder
