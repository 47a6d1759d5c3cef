"""A run that diverges, meets a batch it cannot train on, or loses its data: what it says and what it keeps."""

import dataclasses
import math
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SHARDS, Make, open_data, rows, run, train_on

from megalite.checkpoint.folder import complete, latest, read_manifest
from megalite.config import ConfigError
from megalite.config.errors import TrainingError
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine


def test_divergence_is_told_in_one_line(make: Make) -> None:
    before = signal.getsignal(signal.SIGTERM)
    settings = {"optim__min_lr": 0.0, "optim__warmup_samples": 0, "optim__clip_grad": 0.0, "checkpoint__interval": 1}
    config = make(**settings, train__dtype="fp32", train__steps=9)
    # no configuration takes such a rate
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e30))
    with pytest.raises(TrainingError, match=r"step \d: loss .*(nan|inf).*Lower optim.lr \(now \d") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGTERM) is before
    assert all(math.isfinite(row["loss"]) for row in rows(config, "train"))
    assert len(rows(config, "train")) == read_manifest(complete(Path(config.train.run_dir))[-1])["step"]


def spoil(monkeypatch: pytest.MonkeyPatch, sample: int, factor: float) -> None:
    """Multiply the loss of every batch that holds `sample`."""
    forward_backward = Engine.forward_backward

    def spoiled(engine: Engine, microbatches: Sequence[Microbatch], *more: float) -> dict[str, float]:
        sums = forward_backward(engine, microbatches, *more)
        held = any(sample in mb.samples.tolist() for mb in microbatches if mb.samples is not None)
        if held and not math.isfinite(factor):
            engine.microbatch_losses[-1].fill_(math.nan)
        return {**sums, "loss": sums["loss"] * factor} if held else sums

    monkeypatch.setattr(Engine, "forward_backward", spoiled)


def test_a_batch_that_is_not_finite_is_named_and_can_be_passed_over(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 9, math.nan)
    config = make(checkpoint__interval=1, checkpoint__keep=0)
    run_dir = Path(config.train.run_dir)
    for resume in (None, run_dir / "checkpoints" / "step-00000002"):
        # a resumed run meets it again
        with pytest.raises(TrainingError) as caught:
            run(config, resume)
        assert str(caught.value).startswith("step 3: loss nan, gradient norm ")
        assert re.search(
            r"First not finite: the loss on rank 0, of samples 10 to 11 \(documents? [\d, ]+\); ", str(caught.value)
        )
        assert re.search(
            r"the batch was samples 8 to 11 of train \(documents [\d, .]+\), and a resumed run meets it again: "
            r"train.skip_samples=8:12 passes over it$",
            str(caught.value),
        )
        assert [row["step"] for row in rows(config, "diverged")] == [3]
    capsys.readouterr()

    state = run(make(train__skip_samples="8:12", checkpoint__interval=1, checkpoint__keep=0), latest(run_dir))
    assert (state.step, state.consumed_samples, state.skipped_steps) == (4, 16, 1)
    assert "step 3: train.skip_samples passes over samples 8 to 11\n" in capsys.readouterr().out
    assert [row["step"] for row in rows(config, "train") if "loss" in row] == [1, 2, 4]
    assert [row["step"] for row in rows(config, "train") if "skipped" in row] == [3]
    before, after = (load_file(run_dir / "checkpoints" / f"step-0000000{n}" / SHARDS) for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_skipped_samples_are_a_rule_of_the_samples_alone(make: Make) -> None:
    """Any sample of a batch passes over all of it, and what follows is what would have followed."""
    whole, some = make(train__steps=6), make(train__steps=6, train__skip_samples="11:12,17:100")
    run(whole)
    expected = rows(whole, "train")
    shutil.rmtree(whole.train.run_dir)
    run(some)
    found = [row for row in rows(some, "train") if "loss" in row]
    assert [row["step"] for row in found] == [1, 2, 4]
    assert [row["lr"] for row in found] == [expected[step - 1]["lr"] for step in (1, 2, 4)]
    assert [row["samples"] for row in found] == [4, 8, 16]
    assert [row["loss"] for row in found[:2]] == [row["loss"] for row in expected[:2]]


@pytest.mark.parametrize("text", ["8", "8:", "12:8", "8:8", "-1:4", "a:b", "8:12;16:20", "8:12:16", "1e3:2e3"])
def test_skipped_samples_are_ranges(make: Make, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.skip_samples={text}: .* is not FIRST:END with FIRST below END"):
        make(train__skip_samples=text)


def test_a_spike_of_the_loss_is_told_and_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, 45, 1000.0)
    config = make(train__steps=14)
    run(config)
    warned = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warned) == 1
    assert re.match(
        r"WARNING: step 12: loss \d+ is [\d,.]+ times the usual of the last steps, gradient norm .*; the batch "
        r"was samples 44 to 47 of train \(documents .*train.skip_samples=44:48",
        warned[0],
    )
    spikes = {row["step"]: row["loss_spike"] for row in rows(config, "train") if "loss_spike" in row}
    assert spikes == {12: pytest.approx(1000, rel=0.2)}


def test_a_token_that_the_model_does_not_have(make: Make) -> None:
    config = make(data__valid={}, data__valid_fraction=0.0)
    model = dataclasses.replace(config.model, vocab_size=50)
    data = open_data(config)
    with pytest.raises(TrainingError, match=r"^sample 0: token \d+ is not below model.vocab_size=50; preprocess .*$"):
        train_on(dataclasses.replace(config, model=model), data)


@pytest.mark.parametrize("reader", ["numpy", "cpp"])
def test_data_cut_short_while_training(make: Make, data: Path, tmp_path: Path, reader: str) -> None:
    prefix = shutil.copyfile(data / "train.bin", tmp_path / "cut.bin").with_suffix("")
    shutil.copyfile(data / "train.idx", tmp_path / "cut.idx")
    config = make(data__path=str(prefix), data__valid={}, data__valid_fraction=0.0, data__reader=reader)
    opened = open_data(config)
    os.truncate(f"{prefix}.bin", 40)
    with pytest.raises(ValueError, match=r"cut\.bin: ends at byte \d+, it was truncated while in use"):
        train_on(config, opened)
