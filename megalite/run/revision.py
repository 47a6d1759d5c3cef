"""Which code a run executed: the commit of its git checkout and the uncommitted changes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import megalite
from megalite.watch.disk import write_whole_text

ROOT = Path(megalite.__file__).resolve().parents[1]
# a larger diff is not kept
LARGEST_DIFF = 1 << 20
GIT_S = 10.0


def write_revision(run_dir: Path, step: int, root: Path = ROOT) -> None:
    """Write code.json and, if tracked files were changed, code.diff; nothing without git or a git checkout.

    code.json: `commit`; `dirty`, whether tracked files differ from it; `untracked`, up to 100 files (None: unknown);
    `diff`, the name of the file with the changes, None if there are none or they exceed 1 MiB. Older files with other
    content are renamed to code.before-step-N.json and .diff. Raises OSError if a file cannot be written.
    """
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    diff = _git(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") if commit else None
    if commit is None or diff is None:
        return
    untracked = _git(root, "ls-files", "--others", "--exclude-standard")
    kept = diff if len(diff.encode()) <= LARGEST_DIFF else ""
    found = {
        "commit": commit.strip(),
        "dirty": bool(diff),
        "untracked": None if untracked is None else untracked.splitlines()[:100],
        "diff": "code.diff" if kept else None,
    }
    files = {run_dir / "code.diff": kept, run_dir / "code.json": json.dumps(found, indent=1) + "\n"}
    if all(_bytes(path) == text.encode() for path, text in files.items()):
        return
    for path, text in files.items():
        if path.exists():
            path.rename(run_dir / f"code.before-step-{step:08d}{path.suffix}")
        if text:
            write_whole_text(path, text)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _git(root: Path, *words: str) -> str | None:
    """The output of a git command; None if git is missing, fails or takes longer than GIT_S seconds."""
    # a hook's variables would point git at another repository
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    # other processes may be using the checkout: do not take its lock to refresh the index
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, timeout=GIT_S, env=environment, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None
