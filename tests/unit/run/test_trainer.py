"""The loop on one process: what it counts, when it stops, and what it writes."""

import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import HELDOUT, Make, heldout, open_data, rows, run, train_on

from megalite.checkpoint.folder import complete, latest, read_manifest
from megalite.config import ConfigError
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine
from megalite.optim.lr import learning_rate
from megalite.run.resume import resume_from

# what is counted


def test_rate_and_samples_of_every_step(make: Make) -> None:
    config = make(train__steps=6)
    state = run(config)
    assert (state.step, state.consumed_samples) == (6, 24)
    train_rows = rows(config, "train")
    assert [row["samples"] for row in train_rows] == [4, 8, 12, 16, 20, 24]
    assert [row["lr"] for row in train_rows] == [learning_rate(config.optim, n) for n in range(0, 24, 4)]
    assert train_rows[0]["lr"] < train_rows[2]["lr"] > train_rows[5]["lr"]
    assert all(row["tflops_per_rank"] > 0 and row["peak_memory_gib"] > 0 for row in train_rows)


def test_a_resumed_run_counts_on(make: Make, tmp_path: Path) -> None:
    straight = make(train__run_dir=str(tmp_path / "straight"), train__steps=6, checkpoint__interval=3)
    run(straight)
    decay = {"optim__decay_samples": straight.optim.decay_samples}
    first = make(train__steps=3, **decay)
    run(first)
    state = run(make(train__steps=6, **decay), latest(Path(first.train.run_dir)))
    assert (state.step, state.consumed_samples) == (6, 24)
    for key in ("loss", "lr", "samples", "grad_norm"):
        assert [row[key] for row in rows(first, "train")] == [row[key] for row in rows(straight, "train")]
    assert heldout(first, 6) == heldout(straight, 6)


def test_load_with_and_without_counters(make: Make, tmp_path: Path) -> None:
    source = make()
    run(source)
    both = {"checkpoint__load": source.train.run_dir, "train__steps": 6}
    whole = make(**both, train__run_dir=str(tmp_path / "whole"))
    assert run(whole).consumed_samples == 24
    assert [row["step"] for row in rows(whole, "train")] == [5, 6]
    weights = make(**both, train__run_dir=str(tmp_path / "weights"), checkpoint__load_optim=False)
    assert run(weights).consumed_samples == 24
    assert [row["step"] for row in rows(weights, "train")] == [1, 2, 3, 4, 5, 6]
    assert heldout(weights, 0) == heldout(source, 4)


def test_a_checkpoint_that_leaves_no_steps_is_refused(make: Make, tmp_path: Path) -> None:
    source = make()
    run(source)
    load = {"checkpoint__load": source.train.run_dir, "train__run_dir": str(tmp_path / "again")}
    with pytest.raises(
        ConfigError, match=r"is at step 4 and train\.steps=4: no step is left; raise train\.steps, or load"
    ):
        resume_from(make(**load), print)
    for more in ({"train__steps": 5}, {"checkpoint__load_optim": False}, {"train__eval_only": True}):
        assert resume_from(make(**load, **more), print) is None


# when it stops


def test_patience(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    still = {"optim__lr": 0.0, "optim__min_lr": 0.0, "train__eval_interval": 2, "train__patience": 2}
    config = make(**still, train__steps=50)
    state = run(config)
    assert (state.step, state.evals_without_gain) == (4, 2)
    assert f"stopped at step 4: 2 evaluations without a better held-out loss than {state.best_loss:.4f}; " in (
        capsys.readouterr().out
    )
    (saved,) = complete(Path(config.train.run_dir))
    assert read_manifest(saved)["evals_without_gain"] == 2
    # the same command gives it one more chance
    assert run(config, saved).step == 6


def test_patience_starts_anew_with_every_gain(make: Make) -> None:
    config = make(train__steps=30, train__eval_interval=1, train__patience=3, optim__lr=0.05)
    state = run(config)
    best, waited, means = math.inf, 0, []
    for step in range(state.step + 1):
        means.append(np.mean(list(heldout(config, step).values())))
        best, waited = (means[-1], 0) if means[-1] < best else (best, waited + 1)
        assert (waited == 3) == (step == state.step)
    assert state.best_loss == pytest.approx(min(means), rel=1e-12)
    assert state.evals_without_gain == waited


def test_time_limit(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(train__time_limit_s=1e-6)
    assert run(config).step == 1
    assert "stopped at step 1: train.time_limit_s; run the same command to resume" in capsys.readouterr().out
    (saved,) = complete(Path(config.train.run_dir))
    assert run(make(), saved).step == 4


def test_a_signal(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    forward_backward = Engine.forward_backward

    def interrupted(engine: Engine, microbatches: Sequence[Microbatch], *more: float) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(engine, microbatches, *more)

    monkeypatch.setattr(Engine, "forward_backward", interrupted)
    config = make()
    assert run(config).step == 1
    assert [folder.name for folder in complete(Path(config.train.run_dir))] == ["step-00000001"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_batch_without_a_trained_token_changes_nothing(
    make: Make, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weight decay alone would shrink the weights, and no loss is 0."""
    config = make(optim__name=name, train__eval_interval=1, log__interval=1, train__steps=3, log__plot=True)
    data = open_data(config)
    batch = data.train.batch

    def blind(indices: Sequence[int]) -> Any:
        found = batch(indices)
        if 4 <= indices[0] < 8:  # the second step
            found.loss_mask[:] = 0
        return found

    monkeypatch.setattr(data.train, "batch", blind)
    state = train_on(config, data)
    assert (state.step, state.skipped_steps, state.consumed_samples) == (3, 1, 12)
    assert heldout(config, 2) == heldout(config, 1) != heldout(config, 3)
    first, second, third = rows(config, "train")
    assert ("loss" in first, "loss" in second, "loss" in third) == (True, False, True)
    assert (second["skipped"], "grad_norm" in second) == (1, False)
    assert "2/3  no token of this batch is trained: no update" in capsys.readouterr().out


def test_the_loss_of_small_weights_is_their_mean(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for weight in (1.0, 1e-4):
        config = make(
            train__steps=1, data__valid={}, data__valid_fraction=0.0, train__run_dir=f"{make().train.run_dir}{weight}"
        )
        data = open_data(config)
        monkeypatch.setattr(
            data.train,
            "batch",
            lambda i, b=data.train.batch, w=weight: b(i)._replace(loss_mask=b(i).loss_mask * np.float32(w)),
        )
        train_on(config, data)
        found.append(rows(config, "train")[0]["loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_a_changed_configuration_keeps_the_old_one(make: Make) -> None:
    config = make(train__steps=2)
    run(config)
    run_dir = Path(config.train.run_dir)
    old = (run_dir / "config.yaml").read_text()
    run(make(train__steps=3), latest(run_dir))
    assert (run_dir / "config.before-step-00000002.yaml").read_text() == old
    assert "steps: 3" in (run_dir / "config.yaml").read_text()


def test_tensorboard_has_what_the_metrics_have(make: Make) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make(log__tensorboard=True, train__eval_interval=2)
    run(config)
    events = accumulator.EventAccumulator(str(Path(config.train.run_dir) / "tensorboard"))
    events.Reload()

    def values(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    for key in ("loss", "grad_norm", "lr", "tokens_per_s"):
        expected = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows(config, "train")]
        assert values(f"train/{key}") == expected
    for name in HELDOUT:
        expected = [(step, pytest.approx(heldout(config, step)[name], rel=1e-6)) for step in (0, 2, 4)]
        assert values(f"eval/{name}") == expected
