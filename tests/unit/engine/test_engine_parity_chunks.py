"""Interleaved 1F1B and ZB-H1: loss and all gradients equal those of Hugging Face's models, in float64."""

from collections.abc import Iterator

import pytest
from parity import SHAPES, Case, compare


def chunked() -> Iterator[Case]:
    """Interleaved 1F1B and ZB-H1, on models whose layers do not divide evenly: 7 over 3 x 2, 4 over 1 x 3."""
    layouts = [("interleaved", pp, v) for pp, v in ((1, 2), (1, 3), (2, 2), (2, 3))]
    layouts += [("zb-h1", pp, 1) for pp in (1, 2, 4)]
    for name, tp in (("gqa", 1), ("gqa", 3), ("qknorm", 2)):
        for sp in (False, True) if tp > 1 else (False,):
            for schedule, pp, v in layouts:
                for tied in (False, True):
                    if pp * v <= SHAPES[name].layers:
                        yield Case(name, tp, sp, schedule, pp, tied, chunks=v)


CHUNKED_EXTRA = [
    *(
        Case(name, tp, tp > 1, schedule, 2, tied, dp, chunks=v, zero=zero)
        for name, tp in (("qknorm", 1), ("qknorm", 2))
        for schedule, v, dp in (("interleaved", 2, 2), ("zb-h1", 1, 2))
        for tied in (False, True)
        for zero in (0, 1)
    ),
    *(
        Case("gqa", 3, True, schedule, 2, tied, chunks=v, recompute=recompute)
        for schedule, v in (("interleaved", 3), ("zb-h1", 1))
        for tied in (False, True)
        for recompute in ("selective", "full")
    ),
    Case("gqa", 1, False, "interleaved", 1, True, 2, chunks=3, zero=1),
    Case("gqa", 1, False, "interleaved", 1, True, 2, chunks=2, overlap=False),
    Case("gqa", 1, False, "zb-h1", 1, True, 2, zero=1),
    Case("gqa", 1, False, "interleaved", 2, False, chunks=3, stages=(2, 1, 1, 1, 1, 1)),
    Case("gqa", 1, False, "interleaved", 2, True, chunks=2, isolated=True),
    Case("mqa", 3, True, "zb-h1", 2, chunks=1, isolated=True),
    Case("mqa", 6, True, "interleaved", 2, chunks=2),
]


@pytest.mark.parametrize("case", [*chunked(), *CHUNKED_EXTRA], ids=str)
def test_parity(case: Case) -> None:
    compare(case, evaluates=case in CHUNKED_EXTRA)


def test_the_matrix_is_as_large_as_it_claims() -> None:
    cases = [*chunked()]
    assert {(case.schedule, case.chunks) for case in cases} == {("interleaved", 2), ("interleaved", 3), ("zb-h1", 1)}
    assert len(set(map(str, cases + CHUNKED_EXTRA))) == len(cases + CHUNKED_EXTRA)
