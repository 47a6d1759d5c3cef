"""Encoding in worker processes, and what happens when one of them dies."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.data import preprocess as module
from megalite.data.documents import Document
from megalite.data.preprocess import preprocess
from megalite.data.workers import Encoder, Worker, encode_parallel
from megalite.text.tokenizer import Tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"


def rows(*texts: str) -> list[Document]:
    return [Document(f"f:{number}", text.encode(), True) for number, text in enumerate(texts, start=1)]


def test_an_encoder_adds_tokens_and_counts_what_it_leaves_out(tokenizer: Tokenizer):
    batch = rows('{"a": "God", "b": ""}', '{"a": "山", "b": "the earth"}', '{"a": 5}')
    (a, b), bad = Encoder(tokenizer, ["a", "b"], tokenizer.bos_id, tokenizer.eos_id, True)(batch)
    texts = [tokenizer.encode(text) for text in ("God", "山", "the earth")]
    one, two, three = ([tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in texts)
    assert (a.tokens.tolist(), a.lengths, a.text_bytes, a.empty) == ([*one, *two], [len(one), len(two)], 6, 0)
    assert (b.tokens.tolist(), b.lengths, b.text_bytes, b.empty) == (three, [len(three)], 9, 1)
    assert bad == ["f:3: 'a' is a number, expected text"]
    with pytest.raises(ValueError, match=r"^f:3: 'a' is a number"):
        Encoder(tokenizer, ["a"], None, None, False)(batch)


def test_results_keep_the_order_of_the_batches(tokenizer: Tokenizer):
    """More batches than workers, of which some take longer."""
    batches = [rows(f'{{"text": "{"word " * (2000 if i % 3 == 0 else 1)}{i}"}}') for i in range(8)]
    settings = (["text"], None, None, False)
    workers = [Worker(tokenizer.path, *settings) for _ in range(3)]
    try:
        found = list(encode_parallel(batches, workers))
    finally:
        for worker in workers:
            worker.close()
    alone = [Encoder(tokenizer, *settings)(batch) for batch in batches]
    assert [columns[0].tokens.tolist() for columns, _ in found] == [columns[0].tokens.tolist() for columns, _ in alone]


def test_an_error_of_a_worker_is_raised_here(tokenizer: Tokenizer):
    worker = Worker(tokenizer.path, ["text"], None, None, False)
    try:
        with pytest.raises(ValueError, match=r"^f:1: not JSON"):
            list(encode_parallel([rows("{")], [worker]))
        worker.process.kill()
        with pytest.raises(ValueError, match=r"a worker process died \(exit code -9\)"):
            list(encode_parallel([rows("{}")] * 2, [worker]))
    finally:
        worker.close()


def test_a_killed_worker_is_noticed(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def rows_and_a_kill(*_: object) -> Iterator[Document]:
        for number in range(5000):
            if number == 2000:
                multiprocessing.active_children()[-1].kill()
            yield Document(f"x:{number}", b"some words " * 100, False)

    monkeypatch.setattr(module, "read_documents", rows_and_a_kill)
    with pytest.raises(ValueError, match=r"a worker process died \(exit code -9\).*use fewer workers"):
        preprocess(["x"], tmp_path / "out", tokenizer, workers=2)
    assert list(tmp_path.iterdir()) == []
    assert multiprocessing.active_children() == []


def test_workers_end_with_their_parent_and_its_files_are_swept(tokenizer: Tokenizer, tmp_path: Path):
    """After SIGKILL of the parent all workers end, and the next start removes its temporary files."""
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
