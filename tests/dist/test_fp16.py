"""fp16 with a dynamic loss scale: however the model is cut, and resumed or not, the same steps overflow."""

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, different, pretrain, run_ranks, whole_tensors

from megalite.watch.metrics import read_metrics

# a scale that overflows at first, falls until it fits, and climbs again until it overflows
FP16 = ["train.dtype=fp16", "optim.loss_scale_initial=65536", "optim.loss_scale_window=6", "train.steps=30"]
TP2PP2 = ["parallel.tp=2", "parallel.pp=2"]
TOLERANCE = 1e-2


def train(settings: Any, run_dir: Path, ranks: int, *more: str) -> list[dict[str, Any]]:
    run_ranks(ranks, pretrain, settings(run_dir, *FP16, *more))
    return read_metrics(run_dir)["train"]


def skipped(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if "grad_norm" not in row]


def test_the_same_steps_are_skipped_at_every_topology(settings, tmp_path: Path) -> None:
    alone = train(settings, tmp_path / "single", 1)
    assert [row["step"] for row in alone] == list(range(1, 31))
    assert [row["samples"] for row in alone] == list(range(8, 241, 8))  # a skipped step uses its samples
    first = skipped(alone)
    assert 1 in first, "the initial scale was meant to overflow"
    assert first != list(range(1, len(first) + 1)), "the scale was meant to climb into an overflow again"
    print(f"skipped {first}, scales {[row['loss_scale'] for row in alone]}")
    assert alone[-1]["loss"] < alone[0]["loss"]

    for name, ranks, cuts in (("tp2pp2", 4, TP2PP2), ("zero", 2, ["parallel.dp=2", "parallel.zero=1"])):
        cut = train(settings, tmp_path / name, ranks, *cuts)
        assert skipped(cut) == first, name
        assert [row["loss_scale"] for row in cut] == [row["loss_scale"] for row in alone]
        worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(cut, alone))
        print(f"{name}: losses deviate by {worst:.1e}")
        assert worst <= TOLERANCE


def test_resuming_changes_no_bit(settings, tmp_path: Path) -> None:
    """Scale, its window and the number of updates go on where they were."""
    straight = train(settings, tmp_path / "straight", 1)
    train(settings, tmp_path / "resumed", 1, "train.steps=13")
    resumed = train(settings, tmp_path / "resumed", 1)
    for key in ("loss", "loss_scale"):
        assert [row[key] for row in resumed] == [row[key] for row in straight]
    tensors = [whole_tensors(tmp_path / name / "checkpoints" / "step-00000030") for name in ("straight", "resumed")]
    assert different(*tensors) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_scale_that_cannot_fall_ends_the_run_in_one_line(settings, tmp_path: Path, ranks: int) -> None:
    argv = settings(tmp_path / "run", *FP16, f"parallel.tp={ranks}", "optim.loss_scale_min=65536")
    with Ranks(ranks, pretrain, argv) as running:
        ended = running.wait()
    (line,) = "".join(ended.err).splitlines()
    assert line.startswith("error: gradients overflow fp16 even at a loss scale of 65536")
    assert "use train.dtype=bf16" in line
