"""tools/preprocess_data.py as users call it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.data.indexed import IndexedDataset
from megalite.text.tokenizer import Tokenizer

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
    assert "skipped 1 empty texts" in skipped.stderr


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
