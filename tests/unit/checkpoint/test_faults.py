"""Every fault point is documented, and stands in the code of a save."""

import re
from pathlib import Path

import pytest

from megalite.checkpoint.faults import POINTS, Faults

ROOT = Path(__file__).parents[3]


def test_the_page_lists_the_points_in_their_order() -> None:
    rows = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").partition("## Fault points")[2].splitlines()
    named = [name for row in rows if row.startswith("| `") for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert tuple(named) == POINTS


def test_each_point_is_passed_somewhere() -> None:
    code = "".join(path.read_text() for path in sorted((ROOT / "megalite" / "checkpoint").glob("*.py")))
    assert {*re.findall(r'faults\.at\("([^"]+)"', code)} == set(POINTS)


@pytest.mark.parametrize(
    "order", ["rename", "save.before_rename", "save.before_rename:0", "save.before_rename:x:1", "x:0:1", ":0:1"]
)
def test_an_order_that_means_nothing_is_refused(order: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not POINT:RANK:N; the points are save\.before_folder, .*save\.after_prune$"
    ):
        Faults(0, order)


def test_another_rank_lives() -> None:
    faults = Faults(1, "save.before_rename:0:1")
    faults.at("save.before_rename")
    Faults(0, "").at("save.before_rename")
