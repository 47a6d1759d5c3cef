"""A rank and its launcher: exiting when it dies, and the error file for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from megalite.launch import launcher

# a rank's launcher dies at once; the rank sleeps in a C call meanwhile
ORPHAN = """
import ctypes, os, sys, time
if os.fork():
    time.sleep(1)
    os._exit(0)
from megalite.launch import launcher
launcher.watch_launcher({"WORLD_SIZE": sys.argv[1]})
launcher.training = sys.argv[2] == "True"
print("started", flush=True)
ctypes.CDLL(None).sleep(5)
print("gone" if launcher.launcher_gone() else "here", flush=True)
"""


def orphan(ranks: int, training: bool) -> str:
    command = [sys.executable, "-c", ORPHAN, str(ranks), str(training)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC")}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60).stdout


def test_a_rank_ends_with_its_launcher_unless_it_trains() -> None:
    assert orphan(2, training=False) == "started\n"
    assert orphan(2, training=True) == "started\ngone\n"


def test_a_process_alone_may_outlive_its_shell() -> None:
    assert orphan(1, training=False) == "started\nhere\n"
    assert not launcher.launcher_gone()


def test_the_last_line_is_left_for_the_launcher(tmp_path: Path) -> None:
    launcher.tell_launcher("error: no error file", {})
    launcher.tell_launcher("error: nowhere", {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "lost" / "error.json")})
    path = tmp_path / "error.json"
    launcher.tell_launcher("error: seq_len é", {"TORCHELASTIC_ERROR_FILE": str(path)})
    assert json.loads(path.read_text(encoding="utf-8"))["message"] == "error: seq_len é"
