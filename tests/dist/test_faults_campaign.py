"""A rank is killed, stopped or told to end in any phase of a run: all others end in time, and nothing is lost by it.

`make test` tries a few, `make soak` sixty.
"""

import importlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from campaign import rounds
from ranks import Ended, Ranks, different, pretrain, run_ranks, whole_tensors

from megalite.checkpoint.folder import complete
from megalite.watch.metrics import read_metrics

TIMEOUT_S, STEPS = 10.0, 6
# where the signal comes: at the first call, or that of a later step, of a function
PHASES = {
    "command line": ("megalite.run.command", "parse_command_line", 1),
    "data": ("megalite.data.pretraining", "open_stream", 1),
    "meeting": ("megalite.run.together", "join", 1),
    "reports": ("megalite.run.together", "settle", 1),
    "run folder": ("megalite.run.agree", "_problem", 1),
    "process group": ("torch.distributed", "init_process_group", 1),
    "groups": ("megalite.parallel.groups", "DistWorld.split", 2),
    "model": ("megalite.run.trainer", "build", 1),
    "weights": ("megalite.run.trainer", "first_state", 1),
    "first evaluation": ("megalite.run.trainer", "evaluate", 1),
    "step": ("megalite.run.trainer", "train_step", 4),
    "backward": ("megalite.engine.engine", "Engine.forward_backward", 3),
    "sum": ("megalite.run.step", "sum_numbers", 3),
    "update": ("megalite.engine.engine", "Engine.update", 3),
    "save": ("megalite.checkpoint.save", "Saver.start", 2),
    "write": ("megalite.checkpoint.save", "Saver._write", 2),
    "end": ("megalite.run.trainer", "_finish", 1),
    "leaving": ("torch.distributed", "destroy_process_group", 1),
}
LAYOUTS = {2: ["parallel.dp=2", "parallel.tp=2", "parallel.pp=2"], 4: ["parallel.tp=2", "parallel.pp=2"]}


def pretrain_hit(argv: list[str], rank: int, phase: str, number: int, clock: Path) -> int:
    """`pretrain`, in which one rank's process gets a signal in a phase; the time of it is written to `clock`."""
    if os.environ["RANK"] == str(rank):
        module, name, call = PHASES[phase]
        owner = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original, calls = getattr(owner, last), Counter[str]()

        def hit(*args: object, **settings: object) -> object:
            calls[name] += 1
            if calls[name] == call:
                clock.write_text(str(time.time()))
                os.kill(os.getpid(), number)
            return original(*args, **settings)

        setattr(owner, last, hit)
    return pretrain(argv)


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing disturbs, by layout."""
    found = {}
    for ranks, layouts in LAYOUTS.items():
        for layout in layouts:
            found[f"{ranks} {layout}"] = run_dir = tmp_path_factory.mktemp("straight")
            run_ranks(ranks, pretrain, argv_of(settings, run_dir, layout))
    return found


def argv_of(settings, run_dir: Path, layout: str) -> list[str]:
    free = ["parallel.tp=null", "parallel.pp=null", "parallel.tp=1"] if "dp" in layout else []
    pp = ["parallel.pp=2"] if "pp" in layout else ["parallel.pp=1"]
    tp = ["parallel.tp=2"] if "tp" in layout else ["parallel.tp=1"]
    return settings(
        *(run_dir, *free, *pp, *tp, f"train.steps={STEPS}", "checkpoint.interval=2", "train.micro_batch_size=4"),
        *(f"parallel.timeout_s={TIMEOUT_S}", "optim.decay_samples=48"),
    )


@pytest.mark.timeout(rounds(300, 3600))
def test_whatever_becomes_of_a_rank(settings, straight: dict[str, Path], tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    longest = 0.0
    for number in range(rounds(4, 60)):
        chance = random.Random(number)
        ranks = chance.choice([2, 2, 4])
        layout = chance.choice(LAYOUTS[ranks])
        # every phase and every signal in turn
        phase = list(PHASES)[number * 7 % len(PHASES)]
        kind = [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM][(number + number // len(PHASES)) % 3]
        rank, served = chance.randrange(ranks), chance.random() < 0.5
        rank = max(rank, 1) if phase == "run folder" else rank
        what = f"{number}: {kind.name} to rank {rank} of {ranks} ({layout}, {'agent' if served else 'srun'}) at {phase}"
        run_dir, clock = tmp_path / f"run{number}", tmp_path / f"clock{number}"
        argv = argv_of(settings, run_dir, layout)
        with Ranks(ranks, pretrain_hit, argv, rank, phase, kind, clock, served=served) as started:
            late = time.time() + 60
            while not clock.exists() or not clock.read_text():
                assert time.time() < late, f"{what}: not reached\n{started.ended()}"
                time.sleep(0.01)
            hit = float(clock.read_text())
            deadline = hit + TIMEOUT_S + 2
            while (
                left := set(started.running()) - ({rank} if kind == signal.SIGSTOP else set())
            ) and time.time() < deadline:
                time.sleep(0.02)
            took = time.time() - hit
            ended = started.ended()
            assert not left, f"{what}: ranks {left} still run after {took:.1f} s\n{ended}"
        check(what, kind, rank, ended)
        seen[kind.name] += 1
        longest = max(longest, took)
        print(f"{what}: all ended after {took:.1f} s, {sorted(map(str, ended.codes))}")

        run_ranks(ranks, pretrain, argv, served=served)
        assert losses(run_dir) == losses(straight[f"{ranks} {layout}"]), what
        pair = [whole_tensors(complete(folder)[-1]) for folder in (run_dir, straight[f"{ranks} {layout}"])]
        assert different(*pair) == [], what
    print(f"faults: {dict(seen)}; all others ended within {longest:.1f} s of a deadline of {TIMEOUT_S:g} s; every "
          f"resumed run equals the undisturbed one bit for bit")  # fmt: skip


def check(what: str, kind: signal.Signals, rank: int, ended: Ended) -> None:
    """No traceback, at most a line a rank; whoever ends with an error finds one said."""
    assert "Traceback" not in str(ended), f"{what}\n{ended}"
    assert all(err.count("\n") <= 1 for err in ended.err), f"{what}\n{ended}"
    others = [code for number, code in enumerate(ended.codes) if number != rank]
    if kind == signal.SIGKILL:
        assert ended.codes[rank] == -kind
    if any(others):
        assert "".join(ended.err), f"{what}: nobody says why\n{ended}"
    assert set(others) <= {0, 1, 2}, f"{what}\n{ended}"


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir)["train"]}
