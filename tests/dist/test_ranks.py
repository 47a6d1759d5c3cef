"""The harness itself: what hangs or fails is shown, and nothing outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import COMMON, Ranks, run_ranks


def sleep_for_ever() -> int:
    time.sleep(1000)
    return 0


def fail_on_rank_1() -> int:
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("of rank 1")
    return 0


def test_a_rank_that_hangs_is_killed_and_shown() -> None:
    ranks = Ranks(2, sleep_for_ever)
    with pytest.raises(AssertionError, match=r"2 ranks were still running after 1 s(.|\n)*in sleep_for_ever"), ranks:
        ranks.wait(1)
    assert not any(running(process.pid) for process in ranks.processes)


def test_a_rank_that_fails_is_shown() -> None:
    with pytest.raises(AssertionError, match=r"rank 1, exit status 1\n(.|\n)*ZeroDivisionError: of rank 1"):
        run_ranks(2, fail_on_rank_1)


def test_ranks_end_with_the_process_that_asked_for_them(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import ranks, test_ranks\n"
        "if __name__ == '__main__':\n"
        "    with ranks.Ranks(2, test_ranks.sleep_for_ever) as started:\n"
        "        print(*(process.pid for process in started.processes), flush=True)\n"
        "        started.wait()\n"
    )
    process = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, env=os.environ | COMMON)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"{pids} outlived the process that started them"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether there is such a process; one that is dead and not yet reaped does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
