"""Data names the tokenizer that made it, and the tokenizer is found again after moves."""

import json
import shutil
from pathlib import Path

import pytest

from megalite.data.origin import (
    describe_tokenizer,
    find_tokenizer_of,
    made_with,
    recorded_tokenizer,
    tokenizer_of_run,
)
from megalite.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def own(tokenizer: Tokenizer, tmp_path: Path) -> Tokenizer:
    """A tokenizer in a folder `data`."""
    (tmp_path / "data").mkdir()
    return load_tokenizer(shutil.copy(tokenizer.path, tmp_path / "data" / "tokenizer.model"))


def sidecar(prefix: Path, **values: object) -> Path:
    prefix.with_name(f"{prefix.name}.json").write_text(json.dumps(values), "utf-8")
    return prefix


def test_the_path_is_relative_within_the_folder_of_the_data(own: Tokenizer, tmp_path: Path) -> None:
    found = describe_tokenizer(own, tmp_path / "data")
    assert found == {
        "vocab_size": 600,
        "tokenizer": "tokenizer.model",
        "tokenizer_sha256": own.fingerprint,
    }
    assert describe_tokenizer(own, tmp_path)["tokenizer"] == "data/tokenizer.model"
    assert describe_tokenizer(own, tmp_path / "other")["tokenizer"] == str(own.path)


def test_what_a_sidecar_says(own: Tokenizer, tmp_path: Path) -> None:
    prefix = sidecar(tmp_path / "data" / "a", **describe_tokenizer(own, tmp_path / "data"))
    assert recorded_tokenizer(prefix) == "tokenizer.model"
    assert made_with(prefix, own)
    assert not made_with(sidecar(tmp_path / "b", tokenizer_sha256="0" * 64), own)
    # data without a sidecar, or with an incomplete one
    assert recorded_tokenizer(tmp_path / "none") is None
    assert recorded_tokenizer(sidecar(tmp_path / "c", tokenizer=3)) is None
    assert made_with(tmp_path / "none", own)
    assert find_tokenizer_of(tmp_path / "none") is None


def test_a_tokenizer_is_found_where_it_was_or_next_to_the_data(own: Tokenizer, tmp_path: Path) -> None:
    prefix = sidecar(tmp_path / "data" / "a", **describe_tokenizer(own, tmp_path / "data"))
    assert find_tokenizer_of(prefix) == own.path
    # the whole folder was moved
    moved = tmp_path / "moved" / "a"
    (tmp_path / "data").rename(moved.parent)
    assert find_tokenizer_of(moved) == moved.parent / "tokenizer.model"
    # an absolute path that is gone, but the data has moved next to the tokenizer
    sidecar(moved, tokenizer="/gone/tokenizer.model", tokenizer_sha256=own.fingerprint)
    assert find_tokenizer_of(moved) == moved.parent / "tokenizer.model"


def test_a_tokenizer_is_found_in_other_folders_but_not_another_one(own: Tokenizer, tmp_path: Path) -> None:
    prefix = sidecar(tmp_path / "a", tokenizer="/gone/my.model", tokenizer_sha256=own.fingerprint)
    assert find_tokenizer_of(prefix) is None
    assert find_tokenizer_of(prefix, tmp_path / "empty", tmp_path / "data") == own.path
    sidecar(prefix, tokenizer="/gone/my.model", tokenizer_sha256="0" * 64)
    assert find_tokenizer_of(prefix, tmp_path / "data") is None


def test_the_tokenizer_of_a_run(own: Tokenizer, tmp_path: Path) -> None:
    prefix = sidecar(tmp_path / "a", tokenizer="/gone/my.model", tokenizer_sha256=own.fingerprint)
    assert tokenizer_of_run({"tokenizer": str(own.path), "path": str(prefix)}, tmp_path) == own.path
    assert tokenizer_of_run({"tokenizer": "/gone", "path": str(prefix)}, tmp_path / "data") == own.path
    assert tokenizer_of_run({"sft": str(prefix)}, tmp_path / "data") == own.path
    assert tokenizer_of_run({"path": str(prefix)}, tmp_path) is None
    assert tokenizer_of_run({}, tmp_path) is None
