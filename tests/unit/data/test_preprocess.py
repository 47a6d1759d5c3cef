import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.data import preprocess as module
from megalite.data.documents import Row
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


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=os.sep)


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


def test_a_killed_worker_is_noticed(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def rows_and_a_kill(*_: object) -> Iterator[Row]:
        for number in range(5000):
            if number == 2000:
                multiprocessing.active_children()[-1].kill()
            yield Row(f"x:{number}", b"some words " * 100, False)

    monkeypatch.setattr(module, "read_rows", rows_and_a_kill)
    with pytest.raises(ValueError, match=r"a worker process died \(exit code -9\).*use fewer workers"):
        preprocess(["x"], tmp_path / "out", tokenizer, workers=2)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_workers_end_with_their_parent_and_its_files_are_swept(tokenizer: Tokenizer, tmp_path: Path):
    """SIGKILL of the parent: all workers end, and the next start removes what was being written."""
    source = tmp_path / "in.txt"
    source.write_text("some words of a text that takes a while\n\n" * 500_000)
    command = [sys.executable, TOOL, "--input", source, "--output-prefix", tmp_path / "my"]
    command += ["--tokenizer-model", tokenizer.path, "--workers", "7"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 60
        while len(pids) < 7:
            assert time.monotonic() < deadline, f"{len(pids)} workers"
            time.sleep(0.05)
            pids = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while left := [pid for pid in pids if running(pid)]:
            assert time.monotonic() < deadline, f"{left} of {pids} live on"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    (leftover,) = tmp_path.glob("*.tmp-*")
    assert leftover.name == f"my_text_document.bin.tmp-{process.pid}"
    source.write_text("a text\n")
    preprocess([source], tmp_path / "my", tokenizer)
    assert list(tmp_path.glob("*.tmp-*")) == []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_existing_output_is_kept_unless_told(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    preprocess([source], tmp_path / "out", tokenizer)
    with pytest.raises(ValueError, match=r"out_text_document\.bin exists; pass --overwrite"):
        preprocess([source], tmp_path / "out", tokenizer)
    preprocess([source], tmp_path / "out", tokenizer, append_eod=True, overwrite=True)
    assert IndexedDataset(tmp_path / "out_text_document").sidecar["append_eod"] is True


def test_settings_are_checked(source: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="workers=0"):
        preprocess([source], tmp_path / "out", tokenizer, workers=0)
    with pytest.raises(ValueError, match="JSON keys text, text repeat"):
        preprocess([source], tmp_path / "out", tokenizer, keys=["text", "text"])
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.txt: no document with any text"):
        preprocess([tmp_path / "empty.txt"], tmp_path / "out", tokenizer)
    monkeypatch.setattr(tokenizer, "eos_id", None)
    with pytest.raises(ValueError, match="no end-of-sequence token to append"):
        preprocess([source], tmp_path / "out", tokenizer, append_eod=True)


def test_command_line(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    common = ["--input", source, "--output-prefix", tmp_path / "my", "--tokenizer-model", tokenizer.path]
    done = run(*common, "--append-eod", "--workers", 2, "--log-interval", 100, "--tokenizer-type", "Llama2Tokenizer")
    assert done.returncode == 0, done.stderr
    assert f"data.path={tmp_path / 'my_text_document'}" in done.stdout
    assert "200 documents" in done.stderr
    assert IndexedDataset(tmp_path / "my_text_document").num_documents == len(TEXTS)
    again = run(*common)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "--overwrite" in again.stderr
    other = run(*common, "--overwrite", "--tokenizer-type", "HuggingFaceTokenizer")
    assert "is a SentencePieceTokenizer, not a HuggingFaceTokenizer" in other.stderr


def test_command_line_names_the_bad_row(bad_source: Path, tokenizer: Tokenizer, tmp_path: Path):
    common = ["--input", bad_source, "--output-prefix", tmp_path / "my", "--tokenizer-model", tokenizer.path]
    stopped = run(*common)
    assert stopped.returncode == 2
    assert stopped.stderr.count("\n") == 1
    assert f"{bad_source}:3: not JSON" in stopped.stderr
    skipped = run(*common, "--skip-bad-rows")
    assert skipped.returncode == 0
    assert "skipped 1 bad rows" in skipped.stderr
    assert "left out 1 empty texts" in skipped.stderr


def test_documents_that_begin_with_a_token(source: Path, tokenizer: Tokenizer, tmp_path: Path):
    """Megatron's Llama2Tokenizer begins every document with <s>."""
    common = ("--input", source, "--tokenizer-model", tokenizer.path, "--append-eod")
    plain = run(*common, "--output-prefix", tmp_path / "plain", "--tokenizer-type", "SentencePieceTokenizer")
    assert plain.returncode == 0, plain.stderr
    for name, extra in (("llama2", ["--tokenizer-type", "Llama2Tokenizer"]), ("asked", ["--prepend-bos"])):
        done = run(*common, "--output-prefix", tmp_path / name, *extra)
        assert done.returncode == 0, done.stderr
        data, without = (IndexedDataset(tmp_path / f"{each}_text_document") for each in (name, "plain"))
        assert data.sidecar["prepend_bos"]
        assert "prepend_bos" not in without.sidecar
        for i in range(len(data)):
            assert data[i].tolist() == [tokenizer.bos_id, *without[i].tolist()]


def test_a_text_that_the_tokenizer_cannot_cut_is_named(tmp_path: Path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.BPE({"a": 0}, []))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    made.save(str(tmp_path / "tokenizer.json"))
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("aa", "a" * 40 + "!", "aaa")))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"in\.jsonl:2: .*cannot cut this text"):
        preprocess([source], tmp_path / "out", tokenizer)
    report = preprocess([source], tmp_path / "out", tokenizer, skip_bad_rows=True)
    assert (report.written[0].documents, len(report.bad_rows)) == (2, 1)
