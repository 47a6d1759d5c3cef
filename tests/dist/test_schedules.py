"""Schedules on real ranks: the same bits under each, and a checkpoint of one resumes under any other."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import different, pretrain, run_ranks, whole_tensors

from megalite.watch.metrics import read_metrics

LAYOUTS = {
    "1f1b": (2, ["parallel.pp=2"]),
    "interleaved": (2, ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2"]),
    "zb-h1": (2, ["parallel.pp=2", "parallel.schedule=zb-h1"]),
    "zb-h1-4": (4, ["parallel.pp=4", "parallel.schedule=zb-h1"]),
}
# a learning rate that changes from step to step, so that a wrong step shows
MORE = ["model.num_layers=4", "model.dropout=0.1", "optim.lr_schedule=cosine", "optim.decay_samples=160"]

Train = Callable[[str, Path, int], None]


@pytest.fixture(scope="module")
def train(settings) -> Train:
    """Trains, or continues, the run in a folder to so many steps."""

    def _train(layout: str, run_dir: Path, steps: int) -> None:
        ranks, cuts = LAYOUTS[layout]
        run_ranks(ranks, pretrain, settings(run_dir, *MORE, *cuts, f"train.steps={steps}"))

    return _train


@pytest.fixture(scope="module")
def straight(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of 1F1B."""
    run_dir = tmp_path_factory.mktemp("straight")
    train("1f1b", run_dir, 12)
    return run_dir


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)["train"]]


def heldout(run_dir: Path) -> float:
    return read_metrics(run_dir)["eval"][-1]["loss"]


def tensors(run_dir: Path, step: int = 12) -> dict:
    return whole_tensors(run_dir / "checkpoints" / f"step-{step:08d}")


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "1f1b"])
def test_a_schedule_changes_no_bit(train: Train, straight: Path, tmp_path: Path, layout: str) -> None:
    train(layout, tmp_path, 12)
    assert curve(tmp_path) == curve(straight)
    assert heldout(tmp_path) == heldout(straight)
    assert different(tensors(tmp_path), tensors(straight)) == []


def test_a_checkpoint_resumes_under_any_schedule(train: Train, straight: Path, tmp_path: Path) -> None:
    for layout, steps in [("1f1b", 3), ("interleaved", 6), ("zb-h1-4", 9), ("1f1b", 12)]:
        train(layout, tmp_path, steps)
    assert curve(tmp_path) == curve(straight)
    assert heldout(tmp_path) == heldout(straight)
    assert different(tensors(tmp_path), tensors(straight)) == []
