"""One model, every topology: loss and all gradients equal those of Hugging Face's models, in float64."""

from collections.abc import Iterator

import pytest
from parity import SHAPES, Case, compare


def matrix() -> Iterator[Case]:
    pipelines = [("1f1b", 1)] + [(schedule, pp) for pp in (2, 3, 4) for schedule in ("gpipe", "1f1b")]
    for name, shape in SHAPES.items():
        for tp in shape.tps:
            for sp in (False, True) if tp > 1 else (False,):
                for schedule, pp in pipelines:
                    # what ties the ends together knows nothing of kv heads: the third shape would only cost time
                    for tied in (False, True) if name != "mqa" else (False,):
                        yield Case(name, tp, sp, schedule, pp, tied)


EXTRA = [
    Case("gqa", dp=2, tied=True),
    Case("gqa", dp=4, pp=2, tied=True),
    Case("gqa", tp=3, sp=True, pp=2, dp=2),
    Case("qknorm", tp=4, sp=True, dp=2, tied=True, overlap=False),
    Case("qknorm", tp=2, sp=True, schedule="gpipe", pp=4, dp=2, tied=True),
    Case("gqa", dp=4, zero=1),
    Case("gqa", tp=3, sp=True, pp=2, dp=2, tied=True, zero=1),
    Case("qknorm", tp=4, sp=True, dp=2, overlap=False, zero=1),
    Case("qknorm", tp=2, schedule="gpipe", pp=2, dp=2, tied=True, zero=1),
    Case("mqa", tp=6, sp=True, dp=2, zero=1),
    Case("gqa", isolated=True),
    Case("gqa", tp=3, sp=True, pp=3, isolated=True),
    Case("qknorm", tp=4, schedule="gpipe", pp=2, tied=True, isolated=True),
    Case("mqa", tp=2, sp=True, pp=2, dp=2, isolated=True),
    Case("gqa", pp=3, stages=(1, 5, 1)),
    Case("gqa", tp=3, sp=True, schedule="gpipe", pp=4, tied=True, stages=(3, 1, 1, 2)),
    Case("mqa", tp=6, sp=True, pp=2, stages=(1, 3)),
]


@pytest.mark.parametrize("case", [*matrix(), *EXTRA], ids=str)
def test_parity(case: Case) -> None:
    compare(case, evaluates=case in EXTRA)


def test_the_matrix_is_as_large_as_it_claims() -> None:
    cases = [*matrix()]
    assert len(set(map(str, cases + EXTRA))) == len(cases + EXTRA)
    assert {case.tp for case in cases} == {1, 2, 3, 4} == {case.pp for case in cases}
    # each of these has its own path through the cuts
    for tp in (2, 3, 4):
        here = {(case.sp, case.schedule, case.pp, case.tied) for case in cases if case.tp == tp}
        assert len(here) == 2 * 7 * 2
