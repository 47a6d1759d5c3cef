"""One rank of several is poisoned: all end, one says which, and the run passes over the batch afterwards."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import Ranks, pretrain, run_ranks

from megalite.watch.metrics import read_metrics

STEP = 4


def poisoned(argv: Sequence[str], rank: int) -> int:
    """`pretrain`, in which one rank's first feed-forward gives a NaN at the samples of one step, each time anew."""
    from megalite.engine.engine import Engine

    if os.environ["RANK"] == str(rank):
        run = Engine._run

        def spoiled(engine: Engine, microbatches, *args, **kwargs):
            numbers = [number for mb in microbatches for number in mb.samples.tolist()]
            module = next(iter(engine.models[engine.mesh.pp.rank].layers.values())).mlp
            spoil = min(numbers) // 8 == STEP - 1
            hook = module.register_forward_hook(lambda m, i, out: out * (math.nan if spoil else 1.0))
            try:
                return run(engine, microbatches, *args, **kwargs)
            finally:
                hook.remove()

        Engine._run = spoiled
    return pretrain(argv)


@pytest.mark.parametrize(
    ("ranks", "cuts", "rank", "where"),
    [
        (2, "parallel.dp=2 parallel.zero=1", 1, r"the output of layers.0.mlp_dropout on rank 1 \(dp 1\)"),
        (4, "parallel.pp=2 parallel.tp=2", 2, r"the output of layers.1.mlp_dropout on rank 2 \(pp 1, tp 0\)"),
    ],
)
def test_the_poisoned_rank_is_named(settings, tmp_path: Path, ranks: int, cuts: str, rank: int, where: str) -> None:
    argv = settings(tmp_path / "run", *cuts.split(), "train.steps=6", "checkpoint.interval=1", "log.interval=1")
    for _ in range(2):  # the second resumes, and meets the same batch
        with Ranks(ranks, poisoned, argv, rank) as running:
            ended = running.wait()
        assert 2 in ended.codes, ended
        assert set(ended.codes) <= {1, 2}, ended
        (line,) = "".join(ended.err).splitlines()
        assert re.match(
            rf"error: step {STEP}: loss nan, gradient norm nan: .* First not finite: {where}, of samples ", line
        )
        assert line.endswith("train.skip_samples=24:32 passes over it"), line
    ended = run_ranks(ranks, poisoned, [*argv, "train.skip_samples=24:32"], rank)
    assert (
        "step 4: train.skip_samples passes over samples 24 to 31\nstep 4/6  passed over: no update  lr " in ended.out[0]
    )
    assert [row["step"] for row in read_metrics(tmp_path / "run")["train"] if "loss" not in row] == [4]
