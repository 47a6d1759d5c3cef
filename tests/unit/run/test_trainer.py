"""The loop on one process: what it evaluates, when it stops, what it counts, and what it says when it cannot go on."""

import dataclasses
import math
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from megalite.checkpoint.folder import complete, latest, read_manifest
from megalite.config import Config, ConfigError, check, resolve
from megalite.config.errors import TrainingError
from megalite.data.indexed import IndexedWriter
from megalite.data.sets import DataSets
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.engine.restore import State
from megalite.optim.lr import learning_rate
from megalite.parallel.groups import SoloWorld
from megalite.run.objective import objective_of
from megalite.run.resume import resume_from
from megalite.run.trainer import train
from megalite.watch.metrics import read_metrics

VOCAB, SEQ = 120, 8
HELDOUT = {"a": 100, "b": 41, "c": 2}  # tokens; the last window of b is full, the others' are not
SHARDS = "rank-00000-000.safetensors"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefixes `train`, of a walk that can be learned, and `a`, `b`, `c`, in which no token comes twice."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "train", VOCAB) as writer:
        for _ in range(40):
            writer.add_document(((random.integers(VOCAB) + np.arange(random.integers(5, 40))) % VOCAB).tolist())
    for name, tokens in HELDOUT.items():
        with IndexedWriter(folder / name, VOCAB) as writer:
            for start in range(0, tokens, 30):
                writer.add_document(range(start, min(start + 30, tokens)))
            writer.sidecar = {"text_bytes": 4 * (tokens - 1)} if name == "b" else None
    return folder


Make = Callable[..., Config]


@pytest.fixture
def make(data: Path, tmp_path: Path) -> Make:
    """A resolved configuration of a tiny model in float64; settings by `section__key`."""

    def _make(**settings: Any) -> Config:
        values: dict[str, dict[str, Any]] = {
            "model": {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": 24},
            "parallel": {"tp": 1, "pp": 1},
            "data": {"path": str(data / "train"), "valid": {name: str(data / name) for name in HELDOUT}},
            "train": {
                "run_dir": str(tmp_path / "run"),
                "device": "cpu",
                "dtype": "fp64",
                "steps": 4,
                "seq_len": SEQ,
                "micro_batch_size": 2,
                "global_batch_size": 4,
            },
            "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_samples": 6},
            "log": {"plot": False},
        }
        for name, value in settings.items():
            section, _, key = name.partition("__")
            values.setdefault(section, {})[key] = value
        sections = {f.name: f.default_factory for f in dataclasses.fields(Config)}
        config = resolve(Config(**{s: sections[s](**v) for s, v in values.items()}), 1)  # type: ignore[operator]
        check(config, 1)
        return config

    return _make


def run(config: Config, resume: Path | None = None) -> State:
    return train_on(config, open_data(config), resume)


def open_data(config: Config) -> DataSets:
    return objective_of(config).open_data(config, True)


def train_on(config: Config, data: DataSets, resume: Path | None = None) -> State:
    return train(config, objective_of(config), data, SoloWorld(), resume)


def rows(config: Config, kind: str) -> Rows:
    return read_metrics(Path(config.train.run_dir)).get(kind, [])


def heldout(config: Config, step: int) -> dict[str, float]:
    return {row["name"]: row["loss"] for row in rows(config, "eval") if row["step"] == step}


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[Counter[int]]:
    """The labels that count, of each call of Engine.evaluate."""
    found: list[Counter[int]] = []
    evaluate = Engine.evaluate

    def spy(engine: Engine, microbatches: Sequence[Microbatch]) -> tuple[float, float]:
        found.append(Counter(label for mb in microbatches for label in mb.labels[mb.loss_mask > 0].tolist()))
        return evaluate(engine, microbatches)

    monkeypatch.setattr(Engine, "evaluate", spy)
    return found


# evaluation


def by_hand(config: Config, tokens: int) -> float:
    """Mean loss of a held-out set of tokens 0, 1, 2, …, one window at a time, from logits."""
    engine, total = build(config, SoloWorld()), 0.0
    starts = list(range(0, tokens, 30)) if config.data.isolate_documents else [0]
    for first in range(0, tokens - 1, SEQ):
        window = torch.arange(first, min(first + SEQ + 1, tokens))
        index = torch.arange(len(window) - 1)
        opened = torch.tensor([max([s for s in starts if s <= first + i], default=0) for i in index.tolist()])
        begin = (opened - first).clamp(min=0)
        with torch.no_grad():
            logits = engine.logits(window[None, :-1], (index - begin)[None], torch.stack([begin, index + 1], -1)[None])
        assert logits is not None
        total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
    return total / (tokens - 1)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_evaluation_predicts_every_token_but_the_first_once(
    make: Make, predicted: list[Counter[int]], micro: int, isolated: bool
) -> None:
    batch = {"train__micro_batch_size": micro, "train__global_batch_size": micro}
    config = make(**batch, train__eval_only=True, data__isolate_documents=isolated)
    run(config)
    assert predicted == [Counter(range(1, tokens)) for tokens in HELDOUT.values()]
    found = {row["name"]: row for row in rows(config, "eval")}
    for name, tokens in HELDOUT.items():
        assert found[name]["loss"] == pytest.approx(by_hand(config, tokens), rel=1e-12)
        assert found[name]["tokens"] == tokens - 1
    assert found["b"]["bits_per_byte"] == pytest.approx(found["b"]["loss"] / math.log(2) / 4)
    assert "bits_per_byte" not in found["a"]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_long_evaluation_goes_in_chunks(
    make: Make, predicted: list[Counter[int]], micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(train__eval_only=True, train__micro_batch_size=micro, train__global_batch_size=micro)
    monkeypatch.setattr("megalite.engine.heldout.AT_ONCE", 2)
    run(config)
    windows = sum(-(-(tokens - 1) // SEQ) for tokens in HELDOUT.values())
    assert len(predicted) >= windows / (2 * micro)
    whole = sum((Counter(range(1, tokens)) for tokens in HELDOUT.values()), Counter())
    assert sum(predicted, Counter()) == whole
    assert heldout(config, 0) == pytest.approx({n: by_hand(config, t) for n, t in HELDOUT.items()}, rel=1e-12)


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_eval_samples(make: Make, predicted: list[Counter[int]], micro: int) -> None:
    batch = {"train__micro_batch_size": micro, "train__global_batch_size": micro}
    run(make(**batch, train__eval_only=True, train__eval_samples=4))
    # of the 13 windows of a and the 5 of b the middle of each quarter; c has one
    chosen = {"a": [1, 4, 8, 11], "b": [0, 1, 3, 4], "c": [0]}
    assert predicted == [
        Counter(i for window in chosen[name] for i in range(window * SEQ + 1, min((window + 1) * SEQ + 1, tokens)))
        for name, tokens in HELDOUT.items()
    ]


def test_when_it_evaluates(make: Make) -> None:
    config = make(train__steps=5, train__eval_interval=2)
    run(config)
    assert sorted({row["step"] for row in rows(config, "eval")}) == [0, 2, 4, 5]
    assert len(rows(config, "eval")) == 4 * len(HELDOUT)


def test_eval_only_of_a_checkpoint(make: Make, tmp_path: Path) -> None:
    trained = make()
    run(trained)
    config = make(train__eval_only=True, checkpoint__load=trained.train.run_dir, train__run_dir=str(tmp_path / "eval"))
    run(config)
    assert heldout(config, 4) == heldout(trained, 4)
    assert rows(config, "train") == []
    assert complete(tmp_path / "eval") == []


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
    with pytest.raises(ConfigError, match=r"is at step 4, of train\.steps=4 none is left; raise train\.steps, or take"):
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

    def interrupted(engine: Engine, microbatches: Sequence[Microbatch], *more: float) -> tuple[float, float]:
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


def test_a_held_out_set_without_a_trained_token_has_no_loss(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    data = open_data(config)
    batch = data.heldout["b"].batch
    monkeypatch.setattr(data.heldout["b"], "batch", lambda i: batch(i)._replace(loss_mask=0 * batch(i).loss_mask))
    with pytest.raises(TrainingError, match=r"^held-out set b: no token of the 5 samples looked at is trained$"):
        train_on(config, data)


# when it cannot go on


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

    def spoiled(engine: Engine, microbatches: Sequence[Microbatch], *more: float) -> tuple[float, float]:
        loss, tokens = forward_backward(engine, microbatches, *more)
        held = any(sample in mb.samples.tolist() for mb in microbatches if mb.samples is not None)
        if held and not math.isfinite(factor):
            engine.microbatch_losses[-1].fill_(math.nan)
        return loss * factor if held else loss, tokens

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


def test_a_held_out_loss_that_is_not_finite_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "evaluate", lambda engine, microbatches: (math.nan, 1.0))
    state = run(make(train__eval_only=True))
    assert "WARNING: held out a: the loss is nan" in capsys.readouterr().out
    assert state.best_loss is None


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
    with pytest.raises(ValueError, match=r"cut\.bin: ends at byte \d+, it was cut short while in use"):
        train_on(config, opened)


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
