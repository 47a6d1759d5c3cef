"""Small files are replaced whole or not at all, and every write error has a remedy."""

import errno
import os
from pathlib import Path

import pytest

from megalite.watch import disk
from megalite.watch.disk import reason, remedy, write_whole_text


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("a: 1\n", "a: 春\n"):
        write_whole_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "config.yaml"
    write_whole_text(path, "old\n")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "fsync":
        monkeypatch.setattr(disk.os, "fsync", full)
    else:
        monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_whole_text(path, "new\n")
    monkeypatch.undo()
    assert error.value.filename == str(path)
    assert reason(error.value) == f"No space left on device ({path})"
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        write_whole_text(tmp_path / "gone" / "config.yaml", "text")
    assert "restore it" in remedy(error.value)


def test_reasons_and_remedies() -> None:
    assert reason(OSError("by hand")) == "by hand"
    assert reason(OSError(errno.EIO, "Input/output error"), Path("/runs/a")) == "Input/output error (/runs/a)"
    assert remedy(OSError(errno.EDQUOT, "")).startswith("Your quota")
    assert remedy(OSError(errno.EBADF, "")) == remedy(OSError("by hand")) == disk.DEFAULT_REMEDY
    for text in [*disk.REMEDIES.values(), disk.DEFAULT_REMEDY]:
        assert not text.endswith(".")  # callers write the full stop
