"""From the environment to the threads of a rank."""

import pytest
import torch

from megalite.run.world import set_threads


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch is asked for, which starts no thread."""
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return found


@pytest.mark.parametrize(("text", "threads"), [("3", 3), (" 4 ", 4), ("4,2", 4), ("1", 1), ("1024", 1024)])
def test_omp_num_threads(monkeypatch: pytest.MonkeyPatch, asked: list[int], text: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert set_threads(0, 2) == threads
    assert set_threads(2, 2) == 2  # the key counts more
    assert asked == [threads, 2]


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "100000", "1e3", "9" * 50])
def test_omp_num_threads_that_cannot_be(monkeypatch: pytest.MonkeyPatch, asked: list[int], text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(ValueError, match=r"^OMP_NUM_THREADS='.*' in the environment is not a number of threads from 1"):
        set_threads(0, 2)
    assert asked == []


def test_torchruns_one_thread_is_not_a_wish(monkeypatch: pytest.MonkeyPatch, asked: list[int]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert set_threads(0, 2) == 4
