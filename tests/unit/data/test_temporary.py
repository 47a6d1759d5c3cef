"""Temporary files of dead writers are removed, those of live ones are kept."""

import os
import subprocess
import sys
from pathlib import Path

from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.temporary import Locks, remove_leftovers


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    final, locks = tmp_path / "a.bin", Locks()
    mine = tmp_path / "a.bin.tmp-1"
    locks.open(mine).close()
    (tmp_path / "a.bin.tmp-2").touch()
    (tmp_path / "ab.bin.tmp-3").touch()  # of another file
    remove_leftovers([final])
    assert sorted(os.listdir(tmp_path)) == ["a.bin.tmp-1", "ab.bin.tmp-3"]
    locks.close()
    remove_leftovers([final])
    assert os.listdir(tmp_path) == ["ab.bin.tmp-3"]


def test_a_writer_that_was_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys; from megalite.data.indexed import IndexedWriter;"
        "w = IndexedWriter(sys.argv[1], vocab_size=9); w.add_document([1]); w._write_index(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert len(os.listdir(tmp_path)) == 2
    with IndexedWriter(tmp_path / "a", vocab_size=9) as living:
        living.add_document([2, 3])
        # a second writer keeps the file of the first one, which is alive
        with IndexedWriter(tmp_path / "b", vocab_size=9) as other:
            other.add_document([4])
        assert len(list(tmp_path.glob("a.bin.tmp-*"))) == 1
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.bin", "a.idx"]
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [2, 3]
