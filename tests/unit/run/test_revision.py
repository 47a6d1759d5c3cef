"""The run folder records the commit and the uncommitted changes of the code, and a missing git never matters."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megalite.run import revision
from megalite.run.revision import write_revision


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q")
    (root / "model.py").write_text("width = 1\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "one")
    return root


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def recorded(run_dir: Path, name: str = "code.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / name).read_text())
    return found


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def test_a_clean_checkout(checkout: Path, run_dir: Path) -> None:
    write_revision(run_dir, 0, checkout)
    commit = git(checkout, "rev-parse", "HEAD").strip()
    assert recorded(run_dir) == {"commit": commit, "dirty": False, "untracked": [], "diff": None}
    assert names(run_dir) == ["code.json"]


def test_the_diff_restores_the_code(checkout: Path, run_dir: Path) -> None:
    changed = b"width = 2\r\nname = '\xe6\x98\xa5'\n"
    (checkout / "model.py").write_bytes(changed)
    (checkout / "new.py").touch()
    write_revision(run_dir, 0, checkout)
    assert recorded(run_dir)["untracked"] == ["new.py"]
    assert recorded(run_dir)["dirty"] is True
    git(checkout, "checkout", "-q", "model.py")
    git(checkout, "apply", str(run_dir / recorded(run_dir)["diff"]))
    assert (checkout / "model.py").read_bytes() == changed
    # the same code once more changes nothing
    write_revision(run_dir, 10, checkout)
    assert names(run_dir) == ["code.diff", "code.json"]


def test_other_code_on_resume_keeps_the_record_of_the_first(checkout: Path, run_dir: Path) -> None:
    (checkout / "model.py").write_text("width = 2\n")
    write_revision(run_dir, 0, checkout)
    git(checkout, "commit", "-qam", "two")
    write_revision(run_dir, 7, checkout)
    assert names(run_dir) == ["code.before-step-00000007.diff", "code.before-step-00000007.json", "code.json"]
    assert recorded(run_dir)["dirty"] is False
    assert recorded(run_dir, "code.before-step-00000007.json")["dirty"] is True


def test_a_large_diff_is_not_kept(checkout: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revision, "LARGEST_DIFF", 100)
    (checkout / "model.py").write_text("x" * 200)
    write_revision(run_dir, 0, checkout)
    assert (recorded(run_dir)["dirty"], recorded(run_dir)["diff"]) == (True, None)
    assert names(run_dir) == ["code.json"]


@pytest.mark.parametrize("how", ["no checkout", "no git", "slow git", "no commit", "damaged"])
def test_without_git_nothing_is_written(
    how: str, checkout: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "no checkout":  # a folder inside another repository is not megalite's checkout
        checkout = checkout / "sub"
        checkout.mkdir()
    elif how == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif how == "slow git":
        (tmp_path / "git").write_text("#!/bin/sh\nsleep 5\n")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
        monkeypatch.setattr(revision, "GIT_S", 0.1)
    elif how == "no commit":
        checkout = tmp_path / "fresh"
        checkout.mkdir()
        git(checkout, "init", "-q")
    else:
        (checkout / ".git" / "HEAD").write_text("nonsense")
    write_revision(run_dir, 0, checkout)
    assert names(run_dir) == []


def test_a_hook_of_another_repository_does_not_matter(
    checkout: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    write_revision(run_dir, 0, checkout)
    monkeypatch.delenv("GIT_DIR")
    assert recorded(run_dir)["commit"] == git(checkout, "rev-parse", "HEAD").strip()
