"""What a run wrote can be read back, however it ended, and TensorBoard gets the same numbers."""

import builtins
import importlib.util
import json
import os
import resource
import signal
from pathlib import Path

import pytest

from megalite.run import entry
from megalite.watch.metrics import Metrics, read_metrics, require_tensorboard


def write(run_dir: Path, *rows: dict, **options) -> None:
    metrics = Metrics(run_dir, **options)
    for row in rows:
        metrics.write(**row)
    metrics.close()


def train(step: int, loss: float) -> dict:
    return {"kind": "train", "step": step, "loss": loss}


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.write("train", step=1, loss=2.5)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"kind": "train", "step": 1, "loss": 2.5}.items()
    metrics.close()


def test_a_second_run_appends(tmp_path: Path) -> None:
    write(tmp_path, {"kind": "start"}, train(1, 3.0))
    write(tmp_path, {"kind": "start"}, train(2, 2.0))
    found = read_metrics(tmp_path)
    assert len(found["start"]) == 2
    assert [row["loss"] for row in found["train"]] == [3.0, 2.0]


def test_of_steps_done_twice_the_later_count(tmp_path: Path) -> None:
    write(tmp_path, *(train(step, step + 0.5) for step in (1, 2, 3, 4)))
    write(tmp_path, train(3, 30.0), train(4, 40.0), train(5, 50.0))
    assert [row["loss"] for row in read_metrics(tmp_path)["train"]] == [1.5, 2.5, 30.0, 40.0, 50.0]


def test_held_out_sets_have_steps_of_their_own(tmp_path: Path) -> None:
    rows = [{"kind": "eval", "step": step, "name": name, "loss": step} for name in ("en", "zh") for step in (0, 2, 2)]
    write(tmp_path, *rows)
    found = {(row["step"], row["name"]) for row in read_metrics(tmp_path)["eval"]}
    assert found == {(0, "en"), (2, "en"), (0, "zh"), (2, "zh")}
    assert len(read_metrics(tmp_path)["eval"]) == 4


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', '{"kind": "eval", "name": "é'.encode()[:-1]])
def test_a_torn_line_costs_that_line_alone(tmp_path: Path, torn: bytes) -> None:
    write(tmp_path, train(1, 3.0))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert [row["step"] for row in read_metrics(tmp_path)["train"]] == [1]
    write(tmp_path, train(2, 2.0), train(3, 1.0))
    assert [row["step"] for row in read_metrics(tmp_path)["train"]] == [1, 2, 3]


def test_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    write(tmp_path, {"kind": "start", "resumed": "a\u2028b\x85c"})
    assert read_metrics(tmp_path)["start"][0]["resumed"] == "a\u2028b\x85c"


def refuse_beyond(size: int) -> None:
    """Limit the size of files that this process writes, in bytes (-1: no limit)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_failing_disk_is_reported_once_and_costs_no_line(tmp_path: Path) -> None:
    metrics, path = Metrics(tmp_path), tmp_path / "metrics.jsonl"
    metrics.write("train", step=1, loss=1.0)
    refuse_beyond(path.stat().st_size + 10)  # within a line
    try:
        for step in (2, 3, 4):
            metrics.write("train", step=step, loss=1.0)
    finally:
        refuse_beyond(-1)
    limit = "The file size limit is reached: raise it (ulimit -f)"
    assert metrics.problems() == [(f"{path} cannot be written: File too large. {limit}", True)]
    metrics.write("train", step=5, loss=1.0)
    assert metrics.problems() == []
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path)["train"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("number", "remedy"), [(28, "Free some space"), (122, "quota"), (30, "read-only"), (5, "dmesg")]
)
def test_every_write_error_has_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    metrics = Metrics(tmp_path)

    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(metrics, "_open", broken)
    metrics._close_file()
    metrics.write("train", step=1, loss=1.0)
    ((text, may_end),) = metrics.problems()
    assert may_end
    assert text.startswith(f"{tmp_path}/metrics.jsonl cannot be written: {os.strerror(number)}. ")
    assert remedy in text


def test_a_removed_file_is_started_again(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.write("train", step=1, loss=1.0)
    (tmp_path / "metrics.jsonl").unlink()
    metrics.write("train", step=2, loss=1.0)
    ((text, may_end),) = metrics.problems()
    assert not may_end
    assert "metrics.jsonl was removed while the run was writing to it; a new one is started" in text
    assert [row["step"] for row in read_metrics(tmp_path)["train"]] == [2]


@pytest.mark.parametrize("another", [False, True])
def test_into_another_folder_nothing_is_written_before_it_is_opened(tmp_path: Path, another: bool) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    metrics = Metrics(run_dir)
    metrics.write("train", step=1, loss=1.0)
    run_dir.rename(tmp_path / "old")
    if another:
        run_dir.mkdir()
    for step in (2, 3):
        metrics.write("train", step=step, loss=1.0)
    assert metrics.folder_gone
    assert metrics.problems() == [(f"{run_dir} was removed or renamed while the run was writing to it", True)]
    assert read_metrics(run_dir) == {}
    run_dir.mkdir(exist_ok=True)
    metrics.reopen()
    metrics.write("train", step=4, loss=1.0)
    assert [row["step"] for row in read_metrics(run_dir)["train"]] == [2, 3, 4]
    assert [row["step"] for row in read_metrics(tmp_path / "old")["train"]] == [1]


def test_tensorboard_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path, tensorboard=True)
    metrics.write("train", step=1, loss=1.0)

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    metrics._board.add_scalar = broken
    for step in (2, 3):
        metrics.write("train", step=step, loss=1.0)
    ((text, may_end),) = metrics.problems()
    assert not may_end
    assert text.startswith("TensorBoard's curves end here: No space left on device (")
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path)["train"]] == [1, 2, 3]


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    write(None, train(1, 3.0), tensorboard=True)  # type: ignore[arg-type]
    assert read_metrics(tmp_path) == {}


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path: Path) -> None:
    evals = [{"kind": "eval", "step": step, "name": "zh", "loss": 6.5 - step, "tokens": 9} for step in (0, 2)]
    rows = [{**train(s, 4.0 / s), "grad_norm": 0.5, "lr": 0.25, "tokens_per_s": 1000.0, "mfu": 0.5} for s in (1, 2)]
    write(tmp_path, {"kind": "start"}, evals[0], *rows, evals[1], tensorboard=True)
    assert scalars(tmp_path) == {
        "eval/zh": [(0, 6.5), (2, 4.5)],
        "train/loss": [(1, 4.0), (2, 2.0)],
        "train/grad_norm": [(1, 0.5), (2, 0.5)],
        "train/lr": [(1, 0.25), (2, 0.25)],
        "train/tokens_per_s": [(1, 1000.0), (2, 1000.0)],
        "train/mfu": [(1, 0.5), (2, 0.5)],
    }


def test_tensorboard_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    write(tmp_path, *(train(step, 1.0) for step in (1, 2, 3, 4)), tensorboard=True)
    write(tmp_path, *(train(step, 2.0) for step in (3, 4, 5)), tensorboard=True, step=2)
    assert scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_a_missing_tensorboard_is_reported_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec, load = importlib.util.find_spec, builtins.__import__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))

    def no_torch(name: str, *rest, **more):
        assert not name.startswith("torch"), name
        return load(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    argv = ["--preset", "tiny", "log.tensorboard=true", f"train.run_dir={tmp_path / 'run'}", "train.device=cpu"]
    assert entry.pretrain(argv, default_preset="tiny", corpus=tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: log.tensorboard=true needs the package tensorboard; pip install 'megalite[log]'")
    assert not (tmp_path / "run").exists()

    with pytest.raises(ValueError, match=r"pip install 'megalite\[log\]'"):
        require_tensorboard()
    with pytest.raises(ValueError, match="needs the package tensorboard"):
        Metrics(tmp_path, tensorboard=True)
