"""Ranks killed at random while every step is saved: no kill costs a checkpoint or changes a loss.

`make test` kills three times with and without async_save, `make soak` fifty times each (KILLS=50), a line a kill.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from ranks import Ranks, different, pretrain, run_ranks, whole_tensors

from megalite.checkpoint.folder import complete, read_manifest
from megalite.watch.metrics import read_metrics

KILLS = int(os.environ.get("KILLS", "3"))
CUT = ["parallel.dp=2", "parallel.zero=1", "checkpoint.interval=1"]
LONG = "train.steps=1000000"
OUTSIDE = "between saves"


def steps_taken(run_dir: Path) -> int:
    return len(read_metrics(run_dir).get("train", [])) if (run_dir / "metrics.jsonl").exists() else 0


def building(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob(".building-*"))


def phase(run_dir: Path) -> str:
    """Where in a save the run died, by what it left."""
    newest = complete(run_dir)[-1]
    for folder in building(run_dir):
        if "pruned" in folder.name:
            return "while pruning"
        if "latest" in folder.name:
            return "before the pointer moved"
        names = os.listdir(folder)
        if "manifest.json" in names:
            return "before the rename"
        parts = sum(name.endswith(".json") for name in names)
        files = sum(name.endswith(".safetensors") for name in names)
        if parts or files:
            return f"{files} files begun, {parts} parts whole"
        return "folder made"
    if (run_dir / "checkpoints" / "latest").read_text().strip() != newest.name:
        return "before the pointer"
    return OUTSIDE


def kill_once(argv: list[str], run_dir: Path, chance: random.Random, aimed: bool) -> int:
    """Start the run, kill a rank some time after its first step, an aimed one as a save begins; gives the rank."""
    before, rank = steps_taken(run_dir), chance.randrange(2)
    with Ranks(2, pretrain, argv) as ranks:
        deadline = time.monotonic() + 60
        while steps_taken(run_dir) <= before:
            assert time.monotonic() < deadline, "no step after 60 s"
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        while aimed and not building(run_dir):
            assert time.monotonic() < deadline, "no save after 60 s"
        ranks.send(signal.SIGKILL, rank)
        ended = ranks.wait(30)
    assert ended.codes[rank] == -signal.SIGKILL, ended
    assert ended.codes[1 - rank] == 1, ended
    return rank


@pytest.mark.timeout(120 + 20 * KILLS)
@pytest.mark.parametrize("async_save", ["true", "false"])
def test_no_kill_costs_a_checkpoint(settings, tmp_path: Path, async_save: str) -> None:
    run_dir, seed = tmp_path / "run", random.SystemRandom().randrange(10**6)
    argv = settings(run_dir, *CUT, f"checkpoint.async_save={async_save}")
    run_ranks(2, pretrain, [*argv, "train.steps=1"])
    phases: Counter[str] = Counter()
    while (kills := phases.total()) < KILLS or 3 * (kills - phases[OUTSIDE]) < kills:
        assert kills < 2 * KILLS + 10, f"too few of {kills} kills hit a save: {phases}"
        chance = random.Random(f"{seed} {kills}")
        rank = kill_once([*argv, LONG], run_dir, chance, aimed=kills % 2 == 0)
        newest, died = complete(run_dir)[-1], phase(run_dir)
        read_manifest(newest)
        phases[died] += 1
        print(
            f"async_save={async_save} seed {seed} kill {kills + 1:>3}: rank {rank} after step "
            f"{steps_taken(run_dir):>4}, {died}; goes on from {newest.name}"
        )

    steps = steps_taken(run_dir) + 2
    ended = run_ranks(2, pretrain, [*argv, f"train.steps={steps}"])
    assert "damage" not in ended.out[0]
    straight = tmp_path / "straight"
    run_ranks(2, pretrain, [*settings(straight, *CUT), "checkpoint.interval=0", f"train.steps={steps}"])
    expected = {row["step"]: row["loss"] for row in read_metrics(straight)["train"]}
    assert len(expected) == steps
    # steps that a kill undid count too: each was taken from a checkpoint
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    found = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    assert [step for step, loss in found if loss != expected[step]] == []
    assert {step for step, _ in found} == set(expected)
    assert different(whole_tensors(complete(run_dir)[-1]), whole_tensors(complete(straight)[-1])) == []
    inside = phases.total() - phases[OUTSIDE]
    print(
        f"async_save={async_save}: {phases.total()} kills, {inside} of them inside a save; {steps} steps, of "
        f"{len(found)} losses none differs from the uninterrupted run's; {dict(phases)}"
    )
