"""Real ranks for tests: processes forked from one that has imported torch and run no operation.

Eight processes importing torch at once keep two cores busy for many seconds; forked ones start in a tenth of a second.
pytest's own process cannot be the parent, for its thread pools would not survive the fork, so the standard library's
fork server is. It ends with pytest, however pytest ends, and its ranks end with it.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
PRELOADED = ["pytest", "pynvml", "ranks", "megalite.run.trainer", "torch._dynamo"]
# as seen by every rank; one thread, because sums over two differ
COMMON = {
    "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{Path(__file__).parent}",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Ended:
    """What became of each rank: exit status (negative: the signal that killed it), standard output and error."""

    codes: list[int]
    out: list[str]
    err: list[str]

    def __str__(self) -> str:
        rows = enumerate(zip(self.codes, self.out, self.err))
        return "\n".join(f"--- rank {r}, exit status {code}\n{out}{err}" for r, (code, out, err) in rows)


class Ranks:
    """`size` processes, each in the environment torchrun would give it, calling `function(*args)` -> exit status.

    Leaving the `with` block kills those that are left. `served`: the store is there already, as torchrun's agent has
    it; else rank 0 has to serve it, as under srun. `nodes`: among how many the ranks believe they are divided; `more`:
    variables of the environment.
    """

    def __init__(
        self,
        size: int,
        function: Callable[..., int],
        *args: object,
        served: bool = True,
        nodes: int = 1,
        more: dict[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        if not served:
            self._store = None
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": str(served),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size // nodes),
            **(more or {}),
        }
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with mock.patch.dict(os.environ, COMMON):
            forkserver.ensure_running()
        self.processes = [
            context.Process(target=_main, args=(self._folder.name, rank, environment, function, args))
            for rank in range(size)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.pid is not None:
                process.kill()
                process.join()
        self._folder.cleanup()

    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.is_alive()]

    def ended(self) -> Ended:
        """What has become of them so far; the exit status of one that runs is None."""
        return self._ended()

    def send(self, number: signal.Signals, rank: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout_s: float = 60.0) -> Ended:
        """Wait for every rank to end. After `timeout_s` all are killed and AssertionError shows where each one was."""
        deadline = time.monotonic() + timeout_s
        while running := [p for p in self.processes if p.is_alive()]:
            connection.wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                for process in running:
                    os.kill(process.pid, signal.SIGUSR2)
                time.sleep(0.5)
                for process in running:
                    process.kill()
                    process.join()
                raise AssertionError(f"{len(running)} ranks were still running after {timeout_s} s\n{self._ended()}")
        return self._ended()

    def _ended(self) -> Ended:
        def read(name: str) -> list[str]:
            paths = [Path(self._folder.name, f"{rank}.{name}") for rank in range(len(self.processes))]
            return [path.read_text(errors="replace") if path.exists() else "" for path in paths]

        return Ended([p.exitcode for p in self.processes], read("out"), read("err"))


def run_ranks(
    size: int, function: Callable[..., int], *args: object, served: bool = True, timeout_s: float = 60.0
) -> Ended:
    """Run `function(*args)` on `size` ranks to its end; AssertionError with all output unless each exits 0."""
    with Ranks(size, function, *args, served=served) as ranks:
        ended = ranks.wait(timeout_s)
    assert set(ended.codes) == {0}, f"\n{ended}"
    return ended


def _main(folder: str, rank: int, environment: dict[str, str], function: Callable[..., int], args: tuple) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(f"{folder}/{rank}.{name}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    local_rank = rank % int(environment["LOCAL_WORLD_SIZE"])
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(local_rank))
    sys.exit(function(*args))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def pretrain(argv: Sequence[str]) -> int:
    """What `examples/pretrain_7b.py --preset tiny` does in each process."""
    from megalite.run import entry  # reads the rank from the environment

    return entry.pretrain(argv, default_preset="tiny", corpus=REPOSITORY / "examples" / "corpus")


def pretrain_at(folders: Sequence[Path], argv: Sequence[str]) -> int:
    """`pretrain`, in which each node has a working directory of its own."""
    os.chdir(folders[int(os.environ["RANK"]) // int(os.environ["LOCAL_WORLD_SIZE"])])
    return pretrain(argv)


def finetune(argv: Sequence[str]) -> int:
    """What `examples/sft_7b.py --preset tiny` does in each process."""
    from megalite.run import entry
    from megalite.run.objective import TUNING

    corpus = REPOSITORY / "examples" / "corpus"
    return entry.pretrain(["--preset", "tiny", *argv], default_preset="sft-7b", corpus=corpus, objective=TUNING)


def pretrain_with(argv: Sequence[str], rank: int, step: int, *signals: signal.Signals) -> int:
    """`pretrain`, in which one rank's process gets these signals at the beginning of a step."""
    from megalite.run import trainer

    whole_step = trainer.train_step

    def interrupted(engine: Any, objective: Any, dataset: Any, state: Any, *more: Any) -> Any:
        if state.step + 1 == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return whole_step(engine, objective, dataset, state, *more)

    if os.environ["RANK"] == str(rank):
        trainer.train_step = interrupted
    return pretrain(argv)


def save_untrained(argv: Sequence[str], source: Path | None = None) -> int:
    """Build what this command line asks for, load `source` into it if there is one, and save it without a step."""
    from megalite.checkpoint.save import save
    from megalite.config import parse_command_line
    from megalite.engine import restore
    from megalite.engine.engine import build
    from megalite.plan.topology import lay_out
    from megalite.run.entry import machine_of
    from megalite.run.world import start_world

    request = parse_command_line(argv, default_preset="tiny", prog="test")
    config, _ = lay_out(request.config, machine_of(request), request.explicit)
    with start_world(config) as world:
        engine = build(config, world)
        state = restore.State() if source is None else restore.load(engine, source, restore.State(), True)
        run_dir, values = Path(config.train.run_dir), dataclasses.asdict(state)
        save(run_dir, config, engine.mesh, engine.shards, engine.spans(), engine.state(), values)
    return 0


def whole_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint put together from its blocks, by the manifest alone."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    found = {}
    for name, entry in manifest["tensors"].items():
        whole = torch.full(entry["shape"], torch.nan, dtype=getattr(torch, entry["dtype"]))
        for block in entry["blocks"]:
            part = whole[tuple(slice(start, start + size) for start, size in zip(block["start"], block["size"]))]
            assert part.isnan().all(), f"{name}: elements from {block['start']} are stored twice"
            part.copy_(files[block["file"]][block["key"]])
        assert not whole.isnan().any(), f"{name} is not stored whole"
        found[name] = whole
    return found


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ in a single bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def refused(argv: list[str], message: str, ranks: int = 2) -> None:
    """One rank says why in one line and exits 2; a rank that only loses the others by it is silent and exits 1."""
    with Ranks(ranks, pretrain, argv) as running:
        ended = running.wait()
    assert 2 in ended.codes, ended
    assert set(ended.codes) <= {1, 2}, ended
    (line,) = "".join(ended.err).splitlines()
    assert line.startswith("error: ")
    assert message in line
