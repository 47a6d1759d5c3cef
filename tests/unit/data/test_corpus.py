import json
import multiprocessing
from pathlib import Path

import pytest

from megalite.data.corpus import Corpus, prepare, train_tokenizer
from megalite.data.indexed import IndexedDataset
from megalite.text.tokenizer import Tokenizer

CORPUS = Path(__file__).parents[3] / "examples" / "corpus"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The first 60 chapters and 12 poems."""
    for name, count in (("kjv.jsonl", 60), ("poems.jsonl", 12)):
        lines = (CORPUS / name).read_text("utf-8").splitlines(keepends=True)[:count]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_every_document_is_in_one_split_and_comes_back(corpus: Corpus, tokenizer: Tokenizer):
    found: dict[str, list[str]] = {}
    for name, prefix in {"train": corpus.train, **corpus.heldout}.items():
        data = IndexedDataset(prefix)
        found[name] = [tokenizer.decode(data[i]) for i in range(len(data))]
    poems = [json.loads(line)["text"] for line in (CORPUS / "poems.jsonl").read_text("utf-8").splitlines()]
    chapters = [json.loads(line)["text"] for line in (CORPUS / "kjv.jsonl").read_text("utf-8").splitlines()]
    assert (len(chapters), len(poems)) == (1189, 409)
    assert found["en"] == chapters[19::20]
    assert found["zh"] == poems[7::8]
    assert sorted(found["train"]) == sorted(
        [text for text in chapters if text not in found["en"]] + [text for text in poems if text not in found["zh"]] * 4
    )


def test_the_corpus_is_clean(tokenizer: Tokenizer):
    files = list(CORPUS.glob("*.jsonl"))
    assert sum(path.stat().st_size for path in files) < 4_900_000
    for line in (CORPUS / "poems.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        assert set(row) == {"id", "title", "author", "text"}
        assert "\x1b" not in line
        assert max(map(len, row["text"].split("\n"))) <= 24


def test_the_second_call_finds_the_files(small: Path, tmp_path: Path):
    first = prepare(small, tmp_path / "cache", vocab_size=400)
    stamp = first.tokenizer.stat().st_mtime_ns
    assert prepare(small, tmp_path / "cache", vocab_size=400) == first
    assert first.tokenizer.stat().st_mtime_ns == stamp
    assert IndexedDataset(first.train).sidecar["tokenizer"] == "tokenizer.model"
    assert first.train.parent != prepare(small, tmp_path / "cache", vocab_size=400, zh_repeat=1).train.parent


def test_zh_repeat_counts_the_poems(small: Path, tmp_path: Path):
    sizes = [IndexedDataset(prepare(small, tmp_path, 400, zh_repeat=n).train).num_documents for n in (0, 1, 3)]
    assert sizes == [57, 57 + 11, 57 + 3 * 11]


def test_two_callers_at_once(small: Path, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    callers = [context.Process(target=prepare, args=(small, tmp_path / "cache", 400)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [caller.exitcode for caller in callers] == [0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_same_text_has_the_same_files(small: Path, tmp_path: Path):
    one, two = (prepare(small, tmp_path / name, 400).train.parent for name in "ab")
    assert one.name == two.name
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_errors(small: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="vocab_size=100 must be in"):
        prepare(small, tmp_path / "cache", vocab_size=100)
    with pytest.raises(ValueError, match="zh_repeat=-1"):
        prepare(small, tmp_path / "cache", zh_repeat=-1)
    (small / "poems.jsonl").unlink()
    with pytest.raises(ValueError, match=r"poems\.jsonl: no such file"):
        prepare(small, tmp_path / "cache")


def test_a_failed_build_leaves_nothing(small: Path, tmp_path: Path):
    (small / "kjv.jsonl").write_text('{"text": "too little"}\n' * 40)
    with pytest.raises(ValueError, match="sentencepiece cannot train 600 pieces on this text: Vocabulary size"):
        prepare(small, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_training_is_deterministic():
    lines = [f"line {i} of some text" for i in range(300)]
    assert train_tokenizer(lines, 300) == train_tokenizer(lines, 300)
