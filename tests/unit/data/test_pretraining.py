"""Held-out sets cut from the training data know how many bytes of text a token is."""

import json
from pathlib import Path

import pytest

from megalite.config import Config, DataConfig, ModelConfig, TrainConfig, resolve
from megalite.data import pretraining
from megalite.data.corpus import Corpus
from megalite.data.preprocess import preprocess
from megalite.data.pretraining import open_stream
from megalite.text.tokenizer import load_tokenizer

CORPUS = Path(__file__).parents[3] / "examples" / "corpus"


@pytest.fixture
def made(corpus: Corpus, tmp_path: Path) -> tuple[Path, list[str]]:
    """A prefix of English, then Chinese, whose bytes per token differ, and its texts."""
    texts = [
        json.loads(line)["text"]
        for name, count in (("kjv.jsonl", 30), ("poems.jsonl", 40))
        for line in (CORPUS / name).read_text("utf-8").splitlines()[:count]
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    report = preprocess([tmp_path / "text.jsonl"], tmp_path / "data", load_tokenizer(corpus.tokenizer), append_eod=True)
    return report.written[0].prefix, texts


def config(prefix: Path, tokenizer: Path | None) -> Config:
    data = DataConfig(path=str(prefix), valid_fraction=0.03, tokenizer=str(tokenizer) if tokenizer else None)
    return resolve(Config(ModelConfig(), data=data, train=TrainConfig(seq_len=16)), 1)


@pytest.mark.parametrize("named", [True, False])
def test_a_part_of_the_data_is_measured_by_its_own_text(
    corpus: Corpus, made: tuple[Path, list[str]], named: bool
) -> None:
    prefix, texts = made
    opened = open_stream(config(prefix, corpus.tokenizer if named else None))
    held = opened.heldout["valid"].indexed
    assert 1 < held.num_documents < 40
    text_bytes = sum(len(text.encode()) for text in texts[-held.num_documents :])
    assert opened.bytes_per_token["valid"] == pytest.approx(text_bytes / (held.num_tokens - 1), rel=1e-12)
    # that of the whole data would be far off
    side = held.whole.sidecar
    assert side["text_bytes"] / side["tokens"] > 1.1 * opened.bytes_per_token["valid"]
    assert open_stream(config(prefix, None), scan=False).bytes_per_token == {"valid": None}


def test_a_large_part_is_measured_by_some_of_it(
    corpus: Corpus, made: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_stream(config(made[0], corpus.tokenizer)).bytes_per_token["valid"]
    monkeypatch.setattr(pretraining, "DECODED_TOKENS", 500)
    assert open_stream(config(made[0], corpus.tokenizer)).bytes_per_token["valid"] == pytest.approx(whole, rel=0.1)


def test_another_tokenizer_tells_nothing(corpus: Corpus, made: tuple[Path, list[str]], tmp_path: Path) -> None:
    side = made[0].with_name(f"{made[0].name}.json")
    values = json.loads(side.read_text("utf-8"))
    side.write_text(json.dumps(values | {"tokenizer_sha256": "0" * 64}), "utf-8")
    assert open_stream(config(made[0], None)).bytes_per_token == {"valid": None}
    side.write_text(json.dumps(values | {"tokenizer": "gone.model"}), "utf-8")
    assert open_stream(config(made[0], None)).bytes_per_token == {"valid": None}
