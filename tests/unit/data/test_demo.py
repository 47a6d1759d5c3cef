"""The data that the preset tiny has by default."""

from pathlib import Path

import pytest

from megalite.config import DataConfig
from megalite.data.demo import demo_data
from megalite.data.indexed import IndexedDataset

CORPUS = Path(__file__).parents[3] / "examples" / "corpus"


def test_the_corpus_and_its_held_out_sets(tmp_path: Path) -> None:
    data = demo_data(DataConfig(cache_dir=str(tmp_path / "cache")), CORPUS, 400, tuning=False)
    assert data.path is not None
    assert IndexedDataset(data.path).sidecar["vocab_size"] == 400
    assert set(data.valid) == {"en", "zh"}
    assert all(IndexedDataset(prefix).num_tokens > 1000 for prefix in data.valid.values())
    assert data.tokenizer is not None
    assert Path(data.tokenizer).is_file()
    assert (data.sft, data.template) == (None, None)
    # the second call finds the files; a user's own held-out sets are kept
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    own = demo_data(DataConfig(cache_dir=str(tmp_path / "cache"), valid={"x": "y"}), CORPUS, 400, tuning=False)
    assert (own.path, own.valid) == (data.path, {"x": "y"})
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    asked = demo_data(DataConfig(cache_dir=str(tmp_path / "cache")), CORPUS, 400, tuning=True)
    assert asked.sft is not None
    assert Path(asked.sft).read_text(encoding="utf-8").startswith("{")
    assert (asked.path, asked.template, asked.tokenizer) == (None, "plain", data.tokenizer)


def test_what_cannot_be_prepared(tmp_path: Path) -> None:
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"kjv.jsonl: no such file; the demo corpus is examples/corpus"):
        demo_data(data, tmp_path, 600, tuning=False)
    with pytest.raises(ValueError, match=r"vocab_size=1000 must be in 300..800"):
        demo_data(data, CORPUS, 1000, tuning=False)
