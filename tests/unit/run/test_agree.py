"""What ranks compare, and what is printed if they differ."""

from pathlib import Path
from typing import Any

import pytest

from megalite.config import parse_command_line
from megalite.launch.place import Place
from megalite.run import agree
from megalite.run.agree import difference, fingerprint, report


def facts(rank: int = 0, error: str = "", printed: bool = False, **found: str) -> dict[str, Any]:
    return {"host": f"h{rank}", "node": rank, "error": error, "printed": printed, "facts": found}


def test_the_first_difference_is_reported() -> None:
    assert difference([facts(), facts(1)]) is None
    assert difference([facts(a="is 1"), facts(1), facts(2, a="is 1")]) is None
    found = difference([facts(**{"optim.lr": "is 1"}), facts(1), facts(2, **{"optim.lr": "is 2"})])
    remedy = "start all ranks with the same command and the same configuration files"
    assert found == (2, f"optim.lr is 2 here and is 1 on rank 0 (h0); {remedy}")
    found = difference([facts(**{"parallel.tp": "is 1"}), facts(1, **{"parallel.tp": "is 2"})])
    assert found is not None
    assert "set parallel.tp and parallel.pp" in found[1]


def test_an_error_comes_before_differences_and_is_printed_once() -> None:
    assert difference([facts(a="is 1"), facts(1, a="is 2"), facts(2, "no file")]) == (2, "no file")
    assert difference([facts(0, "no file", printed=True), facts(1, "no file")]) == (0, "")


@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_fingerprints(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agree, "WHOLE_BYTES", 10_000)
    monkeypatch.setattr(agree, "PART_BYTES", 100)
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "x").write_bytes(bytes(size))
    assert fingerprint([a / "x"]) == fingerprint([b / "x"])
    for place in {0, size - 1} if size else ():
        changed = bytearray(size)
        changed[place] = 1
        (b / "x").write_bytes(changed)
        assert fingerprint([a / "x"]) != fingerprint([b / "x"])
    (b / "x").write_bytes(bytes(size + 1))
    assert fingerprint([a / "x"]) != fingerprint([b / "x"])
    assert fingerprint([a / "x"]).startswith(f"{size:,} bytes, digest ")


def test_files_are_read_by_one_rank_of_each_of_several_nodes(tmp_path: Path) -> None:
    (tmp_path / "text.bin").write_bytes(b"12")
    (tmp_path / "text.idx").write_bytes(b"3")
    words = [f"data.path={tmp_path / 'text'}", f"train.run_dir={tmp_path}"]
    config = parse_command_line(words, default_preset="tiny", prog="test").config
    one_node = report(config, None, Place(0, 4, 0, 4))["facts"]
    assert one_node["train.steps"] == f"is {config.train.steps}"
    assert one_node[f"train.run_dir={tmp_path}"] == "has no checkpoint"
    assert not any(value.startswith("holds") for value in one_node.values())
    assert report(config, None, Place(1, 4, 1, 2))["facts"] == one_node
    several = report(config, None, Place(2, 4, 0, 2))["facts"]
    assert several.pop(f"data.path={tmp_path / 'text'}").startswith("holds 3 bytes, digest ")
    assert several == one_node
