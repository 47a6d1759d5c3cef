"""Instruction tuning over real ranks, as `examples/sft_7b.py --preset tiny` runs it."""

import json
from pathlib import Path

import pytest
from ranks import finetune, run_ranks

from megalite.config.read import read_yaml_file
from megalite.data.questions import prepare_questions
from megalite.watch.metrics import read_metrics

CORPUS = Path(__file__).parents[2] / "examples" / "corpus"


def losses(run_dir: Path, kind: str) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir)[kind]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose questions are the first thousand."""
    folder = tmp_path_factory.mktemp("cache")
    found = prepare_questions(CORPUS, folder)
    lines = found.train.read_text("utf-8").splitlines(keepends=True)
    found.train.write_text("".join(lines[:1000]), "utf-8")
    return folder


def test_four_ranks_and_one_learn_alike(tmp_path: Path, cache: Path) -> None:
    common = ["train.device=cpu", f"data.cache_dir={cache}", "train.micro_batch_size=4", "log.plot=false"]
    common += [
        "data.valid_fraction=0.01",
        "train.epochs=0.5",
        "optim.lr=1e-3",
        "optim.warmup_samples=0",
        "train.seq_len=64",
    ]
    ended = run_ranks(4, finetune, [*common, f"train.run_dir={tmp_path / 'four'}"])
    assert "1000 messages rows, template plain" in ended.out[0]
    assert "train.epochs=0.5 of" in ended.out[0]
    assert "training starts from fresh weights" in ended.out[0]
    assert ended.out[1:] == [""] * 3
    run_ranks(1, finetune, [*common, f"train.run_dir={tmp_path / 'one'}", "parallel.tp=1", "parallel.pp=1"])
    for kind in ("train", "eval"):
        assert losses(tmp_path / "four", kind) == pytest.approx(losses(tmp_path / "one", kind), rel=1e-5)
    first, last = losses(tmp_path / "four", "eval")
    assert last < first - 0.5
    # the length of the run is in its configuration, and the template beside it
    saved = read_yaml_file(tmp_path / "four" / "config.yaml")
    steps = len(losses(tmp_path / "four", "train"))
    assert (saved["train"]["steps"], saved["train"]["epochs"]) == (str(steps), "null")
    assert saved["optim"]["decay_samples"] == str(32 * steps)
    assert "endgeneration" in (tmp_path / "four" / "chat_template.jinja").read_text()


def test_it_goes_on_from_pretrained_weights_and_from_itself(tmp_path: Path, cache: Path) -> None:
    """Two steps and two more are the four of one run: the same samples, whatever the topology."""
    common = ["train.device=cpu", f"data.cache_dir={cache}", "log.plot=false", "checkpoint.interval=2"]
    common += ["train.global_batch_size=8", "train.eval_samples=8", "train.seq_len=64"]
    halves = [*common, f"train.run_dir={tmp_path / 'halves'}", "optim.decay_samples=32", "optim.warmup_samples=0"]
    whole = [*common, f"train.run_dir={tmp_path / 'again'}", "optim.decay_samples=32", "optim.warmup_samples=0"]
    run_ranks(4, finetune, [*whole, "train.steps=4"])
    run_ranks(4, finetune, [*halves, "train.steps=2"])
    run_ranks(2, finetune, [*halves, "train.steps=4", "parallel.tp=1", "parallel.pp=2"])
    assert losses(tmp_path / "halves", "train") == pytest.approx(losses(tmp_path / "again", "train"), rel=1e-5)
    # weights alone: another run, from its first step, with the tokenizer and the template of the one before
    load = [
        f"data.sft={prepare_questions(CORPUS, cache).train}",
        f"checkpoint.load={tmp_path / 'halves'}",
        "checkpoint.load_optim=false",
        "train.steps=1",
    ]
    load += ["parallel.tp=2", "parallel.pp=1", f"train.run_dir={tmp_path / 'next'}"]
    ended = run_ranks(2, finetune, [*common, *load])
    assert f"data.tokenizer={tmp_path / 'halves' / 'tokenizer.model'}, data.template=" in ended.out[0]
    assert "fresh weights" not in ended.out[0]
    assert losses(tmp_path / "next", "eval")[0] == pytest.approx(losses(tmp_path / "halves", "eval")[-1], rel=1e-5)
    assert json.loads((tmp_path / "next" / "metrics.jsonl").read_text().splitlines()[0])["at_step"] == 0
