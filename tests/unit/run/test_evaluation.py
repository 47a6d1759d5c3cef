"""Held-out sets: every prediction counted once, when they are measured, and what is said of a loss that is none."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_runs import HELDOUT, SEQ, Make, heldout, open_data, rows, run, train_on
from torch.nn import functional as F

from megalite.checkpoint.folder import complete
from megalite.config import Config
from megalite.config.errors import TrainingError
from megalite.engine.batches import Microbatch
from megalite.engine.engine import Engine, build
from megalite.parallel.groups import SoloWorld


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[Counter[int]]:
    """The labels that count, of each call of Engine.evaluate."""
    found: list[Counter[int]] = []
    evaluate = Engine.evaluate

    def spy(engine: Engine, microbatches: Sequence[Microbatch]) -> dict[str, float]:
        found.append(Counter(label for mb in microbatches for label in mb.labels[mb.loss_mask > 0].tolist()))
        return evaluate(engine, microbatches)

    monkeypatch.setattr(Engine, "evaluate", spy)
    return found


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


def test_a_held_out_set_without_a_trained_token_has_no_loss(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make()
    data = open_data(config)
    batch = data.heldout["b"].batch
    monkeypatch.setattr(data.heldout["b"], "batch", lambda i: batch(i)._replace(loss_mask=0 * batch(i).loss_mask))
    with pytest.raises(TrainingError, match=r"^held-out set b: no token of the 5 samples looked at is trained$"):
        train_on(config, data)


def test_a_held_out_loss_that_is_not_finite_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Engine, "evaluate", lambda engine, microbatches: {"loss": math.nan, "tokens": 1.0})
    state = run(make(train__eval_only=True))
    assert "WARNING: held out a: the loss is nan" in capsys.readouterr().out
    assert state.best_loss is None
