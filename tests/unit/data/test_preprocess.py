import json
from pathlib import Path

import pytest

from megalite.data import preprocess as module
from megalite.data.indexed import IndexedDataset, paths
from megalite.data.preprocess import preprocess
from megalite.text.tokenizer import Tokenizer, load_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"
TEXTS = [f"verse {i}\nof 山 chapter {i * i}" for i in range(200)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": text[:7]}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def bad_source(source: Path) -> Path:
    source.write_text('{"text": "a"}\n{"text": ""}\n{"text": }\n{"text": "b"}\n')
    return source


def test_documents_come_back(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    report = preprocess([source], tmp_path / "out", tokenizer, append_eod=True)
    data = IndexedDataset(tmp_path / "out_text_document")
    assert [tokenizer.decode(data[i]) for i in range(len(data))] == TEXTS
    assert all(data[i][-1] == tokenizer.eos_id for i in range(len(data)))
    written = report.written[0]
    assert (written.documents, written.tokens) == (data.num_documents, data.num_tokens)
    assert data.sidecar == {
        "documents": len(TEXTS),
        "tokens": data.num_tokens,
        "text_bytes": sum(len(text.encode()) for text in TEXTS),
        "vocab_size": 600,
        "append_eod": True,
        "eod_id": 2,
        "tokenizer": str(tokenizer.path),
        "tokenizer_sha256": tokenizer.fingerprint,
        "sources": ["in.jsonl"],
    }


def test_the_output_does_not_depend_on_the_workers(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "BATCH_BYTES", 100)
    for workers in (1, 2):
        preprocess([source], tmp_path / f"by{workers}", tokenizer, workers=workers, keys=["text", "title"])
    for key in ("text", "title"):
        for one, two in zip(paths(tmp_path / f"by1_{key}_document"), paths(tmp_path / f"by2_{key}_document")):
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_stop_or_are_skipped(bad_source: Path, tokenizer: Tokenizer, tmp_path: Path, workers: int):
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"in\.jsonl:3: not JSON"):
        preprocess([bad_source], tmp_path / "out", tokenizer, workers=workers)
    assert set(tmp_path.iterdir()) == before
    report = preprocess([bad_source], tmp_path / "out", tokenizer, workers=workers, skip_bad_rows=True)
    assert (report.written[0].documents, report.empty, len(report.bad_rows)) == (2, 1, 1)


def test_existing_output_is_kept_without_overwrite(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    preprocess([source], tmp_path / "out", tokenizer)
    with pytest.raises(ValueError, match=r"out_text_document\.bin exists; pass --overwrite"):
        preprocess([source], tmp_path / "out", tokenizer)
    preprocess([source], tmp_path / "out", tokenizer, append_eod=True, overwrite=True)
    assert IndexedDataset(tmp_path / "out_text_document").sidecar["append_eod"] is True


def test_settings_are_checked(source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="workers=0"):
        preprocess([source], tmp_path / "out", tokenizer, workers=0)
    with pytest.raises(ValueError, match="JSON keys text, text contain duplicates"):
        preprocess([source], tmp_path / "out", tokenizer, keys=["text", "text"])
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt: no document with any text"):
        preprocess([tmp_path / "empty.txt"], tmp_path / "out", tokenizer)
    monkeypatch.setattr(tokenizer, "eos_id", None)
    with pytest.raises(ValueError, match="no end-of-sequence token to append"):
        preprocess([source], tmp_path / "out", tokenizer, append_eod=True)


def test_a_text_that_the_tokenizer_cannot_cut_is_named(tmp_path: Path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE({"a": 0}, []))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    made.save(str(tmp_path / "tokenizer.json"))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("aa", "a" * 40 + "!", "aaa")))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"in\.jsonl:2: .*cannot split this text"):
        preprocess([source], tmp_path / "out", tokenizer)
    report = preprocess([source], tmp_path / "out", tokenizer, skip_bad_rows=True)
    assert (report.written[0].documents, len(report.bad_rows)) == (2, 1)
