import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.data.indexed import IndexedWriter

# the tests here, and the ranks they start, share the module ranks.py
sys.path.insert(0, str(Path(__file__).parent))
CORPUS = Path(__file__).parents[2] / "examples" / "corpus"

Settings = Callable[..., list[str]]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty chapters as bytes, one token each: the prefix of real indexed data that needs no tokenizer."""
    prefix = tmp_path_factory.mktemp("data") / "text"
    with (
        (CORPUS / "kjv.jsonl").open(encoding="utf-8") as rows,
        IndexedWriter(prefix, vocab_size=257) as writer,
    ):
        for _, row in zip(range(40), rows):
            writer.add_document([*json.loads(row)["text"].encode(), 256])
    return prefix


@pytest.fixture(scope="session")
def settings(text: Path) -> Settings:
    """The command line of a small model in `run_dir`; later settings win. 257 words: tp 2 pads the vocabulary."""

    def _settings(run_dir: Path, *more: str) -> list[str]:
        return [
            *("model.vocab_size=257", "model.hidden_size=32", "model.num_layers=2", "model.ffn_hidden_size=64"),
            *("parallel.tp=1", "parallel.pp=1", "parallel.bucket_mb=0.02"),
            *(f"data.path={text}", "train.device=cpu", "train.threads=1", f"train.run_dir={run_dir}"),
            *("train.seq_len=32", "train.micro_batch_size=2", "train.global_batch_size=8", "train.steps=50"),
            *("train.eval_interval=0", "train.eval_samples=4", "checkpoint.interval=0", "log.plot=false"),
            *("optim.lr=1e-3", "optim.warmup_samples=40", "optim.lr_schedule=constant", *more),
        ]

    return _settings
