"""The README's map names every source file, and no file that is not there."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_file_map_is_true():
    section = ""
    named = set()
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"\| \*\*`(\w+/)`\*\* \|", line):
            section = heading[1]
        elif line.startswith("| `") and section:
            named |= {section + name for name in re.findall(r"`([\w./*-]+)`", line.split("|")[1])}
    missing = [name for name in named if not list(ROOT.glob(name))]
    assert not missing
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "megalite", "csrc", "tools", "examples"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    covered = {str(path.relative_to(ROOT)) for name in named for path in ROOT.glob(name)}
    folders = tuple(name for name in named if name.endswith("/"))
    unnamed = [f for f in tracked if f not in covered and not f.startswith(folders) and not f.endswith("__init__.py")]
    assert not unnamed


def test_commands_name_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(
        r"(?:python|sbatch|examples/\S+ )?\b((?:tools|examples|docs)/[\w./-]+\.(?:py|sbatch|md|png))", text
    ):
        assert (ROOT / name).is_file(), name
