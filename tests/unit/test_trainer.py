"""The loop on one process: what it evaluates, when it stops, what it counts, and what it says when it cannot go on."""

import dataclasses
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megalite import trainer
from megalite.batches import Microbatch, TrainingError
from megalite.build import Engine, build
from megalite.checkpoint.folder import complete, latest, read_manifest
from megalite.config import Config, ConfigError, check, resolve
from megalite.data.indexed import IndexedWriter
from megalite.data.sets import open_data
from megalite.optim.lr import learning_rate
from megalite.parallel.groups import SoloWorld
from megalite.request import resume_from
from megalite.restore import State
from megalite.trainer import train
from megalite.watch.metrics import read_metrics

VOCAB, SEQ = 120, 8
HELDOUT = {"a": 100, "b": 41, "c": 2}  # tokens; the last window of b is full, the others' are not
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
    return train(config, open_data(config), SoloWorld(), resume)


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
    model, total = build(config, SoloWorld()).model, 0.0
    starts = list(range(0, tokens, 30)) if config.data.isolate_documents else [0]
    for first in range(0, tokens - 1, SEQ):
        window = torch.arange(first, min(first + SEQ + 1, tokens))
        index = torch.arange(len(window) - 1)
        opened = torch.tensor([max([s for s in starts if s <= first + i], default=0) for i in index.tolist()])
        begin = (opened - first).clamp(min=0)
        with torch.no_grad():
            logits = model(window[None, :-1], (index - begin)[None], torch.stack([begin, index + 1], -1)[None])
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
    monkeypatch.setattr(trainer, "EVAL_MICROBATCHES", 2)
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
    assert predicted == [Counter(range(1, min(tokens, 4 * SEQ + 1))) for tokens in HELDOUT.values()]


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
    assert "stopped at step 1: train.time_limit_s; the same command goes on from here" in capsys.readouterr().out
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


def test_a_token_that_the_model_does_not_have(make: Make) -> None:
    config = make(data__valid={}, data__valid_fraction=0.0)
    model = dataclasses.replace(config.model, vocab_size=50)
    data = open_data(config)
    with pytest.raises(TrainingError, match=r"^sample 0: token \d+ is not below model.vocab_size=50; preprocess .*$"):
        train(dataclasses.replace(config, model=model), data, SoloWorld(), None)


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
