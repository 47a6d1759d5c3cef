"""Pictures of a simulated plan, as text and as a file."""

import sys
from pathlib import Path

import pytest

from megalite.pipeline.draw import save_png, text_grid
from megalite.pipeline.schedule import gpipe, interleaved, one_f_one_b
from megalite.pipeline.simulate import Costs, simulate


def test_text_grid() -> None:
    played = simulate(one_f_one_b(2, 2))
    assert text_grid(played).splitlines() == [
        "time    0              5",
        "rank 0  F0 F1 .  .  B0--- .  B1---",
        "rank 1  .  F0 B0--- F1 B1--- .  .",
    ]
    wrapped = text_grid(played, width=24).splitlines()
    assert wrapped[:2] == ["time    0", "rank 0  F0 F1 .  .  B0-"]
    assert wrapped[4:6] == ["time    5", "rank 0  -- .  B1---"]
    assert text_grid(simulate(interleaved(2, 2, 2))).splitlines()[1:] == [
        "rank 0  F0  F1  F0' F1' .   .   B0'---- .   B1'---- B0----- B1-----",
        "rank 1  .   F0  F1  F0' B0'---- F1' B1'---- B0----- B1----- .   .",
    ]
    assert "\x1b[" in text_grid(played, colour=True)
    # The unit follows the costs: microseconds, or odd ones, give no wider a grid.
    assert len(text_grid(simulate(one_f_one_b(2, 2), Costs(1000, 2000))).splitlines()[1]) == 34
    assert "F0 F1 .  .  B0--- .  B1---" in text_grid(simulate(one_f_one_b(2, 2), Costs(0.37, 0.81)))
    assert len(text_grid(simulate(gpipe(2, 2), Costs(1e-9, 1)))) < 100_000
    text_grid(simulate(gpipe(2, 2), Costs(0, 0)))


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    save_png(simulate(one_f_one_b(4, 8)), tmp_path / "1f1b.png", "1f1b")
    assert (tmp_path / "1f1b.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install megalite\[plot\]"):
        save_png(simulate(gpipe(1, 1)), tmp_path / "none.png", "")
