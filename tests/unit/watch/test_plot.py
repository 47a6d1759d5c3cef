"""The picture is made of what metrics.jsonl has, and its lack of matplotlib is no failure."""

import sys
from pathlib import Path

import pytest

from megalite.watch.metrics import Metrics
from megalite.watch.plot import _running_mean, plot_losses


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    metrics = Metrics(tmp_path)
    for step in range(1, 41):
        metrics.write("train", step=step, loss=6.4 * 0.98**step + 0.1 * (step % 3), lr=1e-3 * min(1, step / 10))
        if step % 10 == 0:
            for name, above in (("en", 0.2), ("zh", 0.5)):
                metrics.write("eval", step=step, name=name, loss=6.4 * 0.98**step + above)
    metrics.close()
    return tmp_path


def test_a_png_of_the_right_size(run_dir: Path) -> None:
    pytest.importorskip("matplotlib")
    path = plot_losses(run_dir, {"unigram": 5.1})
    assert path == run_dir / "loss.png"
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert (width, height) == (960, 540)
    assert len(data) > 20_000


def test_curves_and_their_names(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot_losses(run_dir, {"unigram": 5.1})
    axes, rate = pyplot.gcf().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "training (mean of 10)",
        "held out: en",
        "held out: zh",
    ]
    assert axes.get_ylabel() == "loss (nats per token)"
    assert len(axes.lines[0].get_xdata()) == 40
    assert list(axes.lines[2].get_xdata()) == [10, 20, 30, 40]
    assert list(axes.lines[4].get_ydata()) == [5.1, 5.1]
    assert len(rate.lines) == 1
    monkeypatch.undo()
    pyplot.close("all")


def test_no_held_out_set_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    metrics = Metrics(tmp_path)
    for name in "abcdefgh":
        metrics.write("eval", step=0, name=name, loss=1.0)
    metrics.close()
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    plot_losses(tmp_path)
    assert len(pyplot.gca().get_legend().get_texts()) == 1 + 8
    monkeypatch.undo()
    pyplot.close("all")


def test_an_empty_run_gets_an_empty_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_losses(tmp_path) == tmp_path / "loss.png"


def test_without_matplotlib(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot_losses(run_dir) is None
    assert not (run_dir / "loss.png").exists()


def test_running_mean() -> None:
    assert _running_mean([4.0, 2.0, 3.0, 9.0], 2) == [4.0, 3.0, 2.5, 6.0]
    assert _running_mean([]) == []
