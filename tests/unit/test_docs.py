"""The documentation is correct: quotations match the source, links resolve, examples print what is shown."""

import contextlib
import io
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
# ```INFO, the body, ```
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(info string, body) of every fenced block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


QUOTATIONS = [(page, info.split()[1], body) for page in PAGES for info, body in blocks(page) if "/" in info]
EXAMPLES = [
    (page, body, after)
    for page in PAGES
    for (info, body), (_, after) in pairwise(blocks(page))
    if info == "python runnable"
]
COMMANDS = [
    (page, *body.split("\n", 1))
    for page in PAGES
    for info, body in blocks(page)
    if info == "console" and body.startswith("$ python tools/schedule.py")
]


def test_there_is_something_to_check() -> None:
    assert len(QUOTATIONS) >= 10
    assert len(EXAMPLES) >= 5
    assert COMMANDS


@pytest.mark.parametrize(("page", "file", "body"), QUOTATIONS, ids=lambda v: v.stem if isinstance(v, Path) else None)
def test_quotations_match_the_source(page: Path, file: str, body: str) -> None:
    assert body in (ROOT / file).read_text(encoding="utf-8"), f"{name(page)} quotes {file} wrongly:\n{body}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_paths_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    lost = [link for link in links if link and not (page.parent / link).exists()]
    # files named in running text, from the root of the repository
    top = r"`((?:megalite|tests|tools|examples|benchmarks|csrc|docs)/[\w./-]+\.(?:py|cpp|h|md|sbatch|png))`"
    lost += [path for path in re.findall(top, text) if not (ROOT / path).exists()]
    assert not lost, f"{name(page)}: {', '.join(lost)}"


@pytest.mark.parametrize(("page", "code", "printed"), EXAMPLES, ids=lambda v: v.stem if isinstance(v, Path) else "")
def test_examples_print_what_the_page_says(page: Path, code: str, printed: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, name(page), "exec"), {"__name__": "__example__"})
    assert out.getvalue() == printed


@pytest.mark.parametrize(("page", "command", "printed"), COMMANDS, ids=lambda v: v.stem if isinstance(v, Path) else "")
def test_commands_print_what_the_page_says(page: Path, command: str, printed: str) -> None:
    words = command.removeprefix("$ python ").split()
    run = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed


def test_pictures_are_small_and_used() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (ROOT / "docs" / "img").glob("*.png"):
        assert picture.stat().st_size < 120_000, picture.name
        assert f"img/{picture.name}" in text, f"no page shows {picture.name}"
