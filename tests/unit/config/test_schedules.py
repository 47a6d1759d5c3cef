"""The table of schedules: the names users type, and that it agrees with the lists of actions."""

import pytest

from megalite.config.schedules import SCHEDULES, nearest
from megalite.pipeline.schedule import CHUNKED_PLANS, PLANS, make_plan


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1F1", "1f1b"),
        ("interleaved_1f1b", "interleaved"),
        ("Interleaved1F1B", "interleaved"),
        ("zero_bubble", "zb-h1"),
        ("zbh1", "zb-h1"),
        ("ZB-H2", "zb-h1"),
        ("gpip", "gpipe"),
        ("one-f-one-b", "1f1b"),
        ("zzz", None),
    ],
)
def test_nearest(written: str, meant: str | None) -> None:
    assert nearest(written) == meant


def test_rows_describe_the_plans() -> None:
    assert set(SCHEDULES) == {*PLANS, *CHUNKED_PLANS}
    for name, row in SCHEDULES.items():
        assert row.chunked == (name in CHUNKED_PLANS)
        ops = {action.op for actions in make_plan(name, 2, 4, 2 if row.chunked else 1) for action in actions}
        assert row.splits == ("W" in ops)
