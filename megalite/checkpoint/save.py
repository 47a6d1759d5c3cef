"""Saving: every rank writes its own blocks, beside the training or in its way; when all have, rank 0 publishes them."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.blocks import Part, parts_of
from megalite.checkpoint.faults import Faults
from megalite.checkpoint.folder import building_folder, step_folder
from megalite.checkpoint.publish import point_at, prune, publish, write_rank
from megalite.config import Config
from megalite.parallel.cuts import Shard, uncut
from megalite.parallel.groups import share_text
from megalite.parallel.mesh import Mesh

IDLE, WRITING, PUBLISHING = range(3)


class SaveFailed(OSError):
    """A checkpoint could not be written; the message names the rank, the reason and what to do."""


class Saver:
    """One rank's side of the saves of a run. All ranks call `start`, `settle` and `finish` alike.

    A save has two halves. In the first every rank writes its blocks, in the second rank 0 makes them a checkpoint and
    lets old ones go. With checkpoint.async_save both run in a thread. The thread talks to no other rank: that a half is
    over everywhere is told by `progress`, two numbers that the caller sums over the ranks along with those of a step.
    """

    def __init__(self, run_dir: Path, config: Config, mesh: Mesh) -> None:
        self.run_dir, self.config, self.mesh = run_dir, config, mesh
        self._faults = Faults(mesh.world.rank)
        self._half, self._thread, self._error = IDLE, None, None  # type: tuple[int, threading.Thread | None, Any]
        self._state: dict[str, Any] = {}
        self._final = self._building = run_dir

    def start(
        self,
        shards: dict[str, Shard],
        spans: Mapping[str, range],
        kinds: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
    ) -> None:
        """Begin to save; arguments as of `save`. With async_save this waits for a copy in host memory only."""
        assert self._half == IDLE
        self._state, self._final = state, step_folder(self.run_dir, state["step"])
        self._building = building_folder(self._final)
        owned = list(own_parts(shards, spans, kinds))
        parts = [part for part, _ in owned]
        need = torch.tensor([float(sum(part.bytes for part in parts))], dtype=torch.float64, device=self.mesh.device)
        total = int(self.mesh.world.all_reduce(need))
        views: Iterable[Tensor] = (view for _, view in owned)
        if self.config.checkpoint.async_save:
            views = [view.to("cpu", copy=True) for view in views]
        self._begin(WRITING, lambda: self._write(parts, views, total))

    def progress(self) -> tuple[float, float]:
        """(1 if this rank's half of a save is over, 1 if it failed): to be summed over all ranks for `settle`."""
        over = self._half != IDLE and not (self._thread is not None and self._thread.is_alive())
        return float(over), float(over and self._error is not None)

    def settle(self, over: float, failed: float) -> Path | None:
        """Go on by the sums of `progress`; gives the folder of a save that has now ended.

        SaveFailed, the same on every rank, where a rank could not write; the half-written folder is gone then.
        """
        if self._half == IDLE or over < self.mesh.world.size:
            return None
        self.close()
        if failed:
            self._fail()
        if self._half == WRITING:
            self._begin(PUBLISHING, self._publish if self.mesh.world.rank == 0 else lambda: None)
            return None
        self._half = IDLE
        return self._final

    def finish(self) -> Path | None:
        """Wait for the save under way, if there is one, and settle it. Collective."""
        final = None
        while self._half != IDLE:
            self.close()
            sums = torch.tensor(self.progress(), dtype=torch.float64, device=self.mesh.device)
            over, failed = self.mesh.world.all_reduce(sums).tolist()
            final = self.settle(over, failed)
        return final

    def close(self) -> None:
        """Wait for this rank's thread; what it was writing is left as it is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _begin(self, half: int, job: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._half = half
        if self.config.checkpoint.async_save:
            self._thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            guarded()

    def _write(self, parts: list[Part], views: Iterable[Tensor], total: int) -> None:
        parent = self._building.parent
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if total > free:
            raise OSError(errno.ENOSPC, f"it takes {total:,} bytes and {free:,} are free", str(parent))
        write_rank(self._building, self.mesh.world.rank, parts, views, self._faults)

    def _publish(self) -> None:
        c = self.config.checkpoint
        publish(self._building, self._final, self.config, self._state, self._faults)
        point_at(self._final, self._faults)
        prune(self._final, c.keep, c.keep_every, self._faults)

    def _fail(self) -> None:
        """End a save that has failed on some rank: every rank is here, and none is writing."""
        error, self._error, self._half = self._error, None, IDLE
        if self.mesh.world.rank == 0:
            shutil.rmtree(self._building, ignore_errors=True)
        text = ""
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
            text = f"rank {self.mesh.world.rank} cannot write the checkpoint of step {self._state['step']}: {reason}"
        elif error is not None:
            text = f"{type(error).__name__} {error}"
        text = share_text(self.mesh.world, text, self.mesh.device)
        if error is not None and not isinstance(error, OSError):
            raise error
        raise SaveFailed(text)


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
