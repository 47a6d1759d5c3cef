"""Saving: every rank writes its own blocks, beside the training or in its way; when all have, rank 0 publishes them."""

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

# how long rank 0 waits, in the end, between looks for the others' parts; how long a file system may take to show them
LOOK_S, SHOW_S = 0.5, 30.0


class SaveFailed(OSError):
    """A checkpoint could not be written; the message names the rank and the reason, `remedy` says what to do."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class Saver:
    """One rank's side of the saves of a run. All ranks call `start`, `settle` and `finish` alike.

    Every rank writes its blocks and says so by a file, its part; rank 0 makes them a checkpoint when it sees the parts
    of all, and lets old ones go. With checkpoint.async_save this is done by threads, which talk to no other rank but
    through the run folder: a checkpoint is published as soon as it is written, however long the step under way takes.
    That a save is over, or has failed somewhere, is told by `progress`, two numbers that the caller sums over the ranks
    along with those of a step.
    """

    def __init__(self, run_dir: Path, config: Config, mesh: Mesh) -> None:
        self.run_dir, self.config, self.mesh = run_dir, config, mesh
        self._faults = Faults(mesh.world.rank)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._under_way = False
        # of this rank: its part is over, its publishing is over; told to it: all parts are written, do not wait for any
        self._written, self._published = threading.Event(), threading.Event()
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
        """Begin to save; arguments as of `save`. With async_save this waits for a copy in host memory only."""
        assert not self._under_way
        self._state, self._final = state, step_folder(self.run_dir, state["step"])
        self._building = building_folder(self._final)
        owned = list(own_parts(shards, spans, kinds))
        parts = [part for part, _ in owned]
        need = torch.tensor([float(sum(part.bytes for part in parts))], dtype=torch.float64, device=self.mesh.device)
        total = int(self.mesh.world.all_reduce(need))
        views: Iterable[Tensor] = (view for _, view in owned)
        self._under_way, self._error, self._outcome = True, None, f"cannot write the checkpoint of step {state['step']}"
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
        """What to sum over all ranks for `settle`.

        (1 if this rank has written its part, 2 if it has published the checkpoint too, 1 if either has failed).
        """
        over = self._written.is_set() + self._published.is_set()
        return float(over), float(over > 0 and self._error is not None)

    def settle(self, over: float, failed: float) -> Path | None:
        """Go on by the sums of `progress`; gives the folder of a save that has now ended.

        SaveFailed, the same on every rank, where a rank could not write; the half-written folder is gone then.
        """
        if not self._under_way or over < self.mesh.world.size:
            return None
        if failed:
            self._fail()
        if over > self.mesh.world.size:
            self.close()
            self._idle()
            return self._final
        self._all_written.set()
        if self._thread is None and self.mesh.world.rank == 0:
            self._publish()
        return None

    def finish(self) -> Path | None:
        """Wait for the save under way, if there is one, and settle it. Collective."""
        final = None
        while self._under_way:
            self._written.wait()
            if self._all_written.is_set() and self._thread is not None:
                self._thread.join()
            sums = torch.tensor(self.progress(), dtype=torch.float64, device=self.mesh.device)
            over, failed = self.mesh.world.all_reduce(sums).tolist()
            final = self.settle(over, failed)
        return final

    def close(self) -> None:
        """Wait for this rank's thread. It ends what it is writing, and publishes what all ranks have written."""
        self._leave.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _idle(self) -> None:
        self._under_way = False
        self._written.clear()
        self._published.clear()

    @contextmanager
    def _guarded(self, over: threading.Event) -> Iterator[None]:
        """Keep what goes wrong for `settle`, and then say that this much is over."""
        try:
            yield
        except BaseException as error:
            self._error = error
        finally:
            over.set()

    def _write(self, parts: list[Part], views: Iterable[Tensor], total: int) -> None:
        with self._guarded(self._written):
            parent = self._building.parent
            parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(parent).free
            if total > free:
                raise OSError(errno.ENOSPC, f"it takes {total:,} bytes and {free:,} are free", str(parent))
            write_rank(self._building, self.mesh.world.rank, parts, views, self._faults)

    def _publish(self) -> None:
        c = self.config.checkpoint
        with self._guarded(self._published):
            if not self._wait_for_parts():
                return
            publish(self._building, self._final, self.config, self._state, self._faults)
            self._outcome = f"has written the checkpoint of step {self._state['step']} and cannot remove an older one"
            point_at(self._final, self._faults)
            prune(self._final, c.keep, c.keep_every, self._faults)

    def _wait_for_parts(self) -> bool:
        """Until every rank's part is there; false where it is told to leave before."""
        ranks, deadline, pause = self.mesh.world.size, math.inf, LOOK_S / 100
        while missing := missing_parts(self._building, ranks):
            if self._all_written.is_set() and deadline == math.inf:
                deadline = time.monotonic() + min(SHOW_S, self.config.parallel.timeout_s / 3)
            if time.monotonic() > deadline:
                raise PartsMissing(
                    f"rank {', '.join(map(str, missing))} of {ranks} has written its part, and rank 0 does not see it "
                    f"in {self._building.parent}"
                )
            if self._leave.wait(pause) or launcher.ending:
                return not missing_parts(self._building, ranks)
            pause = min(1.5 * pause, LOOK_S)
        return True

    def _fail(self) -> None:
        """End a save that has failed on some rank: every rank is here, and none is writing."""
        self.close()
        error, self._error = self._error, None
        self._idle()
        if self.mesh.world.rank == 0:
            shutil.rmtree(self._building, ignore_errors=True)
        what = f"rank {self.mesh.world.rank} {self._outcome}: "
        text = ""
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
        raise SaveFailed(*text.split("\n", 1))


class PartsMissing(Exception):
    """Rank 0 does not see what other ranks have written."""


def save(
    run_dir: Path,
    config: Config,
    mesh: Mesh,
    shards: dict[str, Shard],
    spans: Mapping[str, range],
    kinds: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
) -> Path:
    """Write a checkpoint of `kinds` ({"weight": {name: tensor}, "exp_avg": …}) and give back its folder.

    A tensor is a local one, or the part `spans[name]` of it, flattened. Each rank writes what it owns of `spans`, the
    elements of the flattened local tensors that it answers for. `state` holds plain values, among them step and
    consumed_samples. Collective: every rank of the world calls. Raises SaveFailed where the disk refuses; the previous
    checkpoint is then untouched.
    """
    saver = Saver(run_dir, config, mesh)
    saver.start(shards, spans, kinds, state)
    final = saver.finish()
    assert final is not None
    return final


def own_parts(
    shards: dict[str, Shard], spans: Mapping[str, range], kinds: dict[str, dict[str, Tensor]]
) -> Iterator[tuple[Part, Tensor]]:
    """What this rank writes: each part with the view of its values."""
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
    """Write the checkpoint `folder` from one process, tensor by tensor: `get(full name)` is asked for each in turn.

    `tensors`: dtype and shape by full name, as `weight.embed.weight`. Memory: the largest tensor and one block. `state`
    as in `save`. ValueError where the folder exists or a tensor is not what was announced; nothing is left then.
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
                del whole  # never two at once
                name, whole = part.full, get(part.full)
                found, announced = (whole.dtype, tuple(whole.shape)), tensors[name]
                if found != (announced[0], tuple(announced[1])):
                    raise ValueError(f"tensor {name} is {found}, not {announced} as announced")
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
