"""What a continued run takes over: its place in the data, and a learning-rate curve that ends where the run ends."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.folder import step_folder
from megalite.checkpoint.save import write_whole
from megalite.checkpoint.state import State
from megalite.config import ConfigError, Request, Resolved, parse_command_line, resolve
from megalite.config.batch import batch_size
from megalite.config.shapes import shapes
from megalite.optim.lr import learning_rate
from megalite.run.length import progress_of, with_curve, with_epochs

# the numbers of the reported case: 20 steps of 16 samples, from 3e-3 to 3e-4
RUN = ["train.steps=20", "train.global_batch_size=16", "train.micro_batch_size=2", "optim.warmup_samples=0"]
RUN += ["optim.lr=3e-3", "optim.min_lr=3e-4", "parallel.tp=1", "parallel.pp=1"]
RUN += ["model.vocab_size=9", "model.hidden_size=8", "model.num_layers=1", "model.ffn_hidden_size=8"]


class Told(list):
    def __call__(self, text: str) -> None:
        self.append(text)


def asked(run_dir: Path, *argv: str) -> Request:
    return parse_command_line([*RUN, f"train.run_dir={run_dir}", *argv], default_preset="tiny", prog="test")


def start(run_dir: Path, say: Told, *argv: str) -> Resolved:
    """The configuration of a run, begun or continued."""
    request = asked(run_dir, *argv)
    return with_curve(resolve(request.config, 1), request, say)


def rates(config: Resolved, step: int, samples: int) -> list[float]:
    """Of every step that is left."""
    found = []
    for _ in range(step, config.train.steps):
        found.append(learning_rate(config.optim, samples))
        samples += batch_size(config.train, config.parallel.dp, samples)
    return found


def save(config: Resolved, step: int, samples: int) -> None:
    folder = step_folder(Path(config.train.run_dir), step)
    wholes = {f"weight.{name}": (torch.float32, shape) for name, shape in shapes(config.model).items()}
    moments = {f"{kind}.{name}": x for kind in ("exp_avg", "exp_avg_sq") for name, x in wholes.items()}
    tensors = wholes | {full.replace(".weight.", ".", 1): x for full, x in moments.items()}
    state = dataclasses.asdict(State(step=step, consumed_samples=samples))
    write_whole(folder, config, tensors, lambda full: torch.zeros(tensors[full][1]), state)


def saved(run_dir: Path, step: int, *argv: str) -> tuple[Resolved, int]:
    """A run stopped after so many steps; gives its configuration and the samples it used."""
    config, samples = start(run_dir, Told(), *argv), 0
    for _ in range(step):
        samples += batch_size(config.train, config.parallel.dp, samples)
    save(config, step, samples)
    return config, samples


def test_the_same_command_keeps_the_curve_and_says_nothing(tmp_path: Path) -> None:
    for number, more in enumerate(([], ["train.ramp_start=2", "train.ramp_samples=100"], ["optim.decay_samples=99"])):
        run_dir, said = tmp_path / str(number), Told()
        before, _ = saved(run_dir, 10, *more)
        assert start(run_dir, said, *more) == before
        assert said == []


@pytest.mark.parametrize(("before", "after", "end"), [(16, 4, 200), (4, 16, 200), (16, 32, 480)])
def test_another_batch_ends_the_curve_where_the_run_ends(tmp_path: Path, before: int, after: int, end: int) -> None:
    _, samples = saved(tmp_path, 10, f"train.global_batch_size={before}")
    said = Told()
    config = start(tmp_path, said, f"train.global_batch_size={after}")
    assert config.optim.decay_samples == end
    left = rates(config, 10, samples)
    assert left == sorted(left, reverse=True)
    assert learning_rate(config.optim, end) == pytest.approx(3e-4)
    assert min(left) > 3e-4
    (line,) = said
    was = learning_rate(start(tmp_path / "other", Told(), f"train.global_batch_size={before}").optim, samples)
    assert f"changes from {was:.3g} to {left[0]:.3g} at step 11 (sample {samples})" in line
    assert f"optim.decay_samples {20 * before} -> {end}" in line
    assert f"to keep the old curve set optim.decay_samples={20 * before}, or optim.lr_on_resume=keep" in line


def test_more_steps_are_told_and_either_remedy_keeps_the_curve(tmp_path: Path) -> None:
    before, samples = saved(tmp_path, 18)
    said = Told()
    config = start(tmp_path, said, "train.steps=40")
    assert (config.optim.decay_samples, said[0].split(";")[0]) == (
        640,
        "WARNING: the learning rate changes from 0.000366 to 0.00186 at step 19 (sample 288): "
        "optim.decay_samples 320 -> 640",
    )
    for remedy in ("optim.decay_samples=320", "optim.lr_on_resume=keep"):
        said = Told()
        config = start(tmp_path, said, "train.steps=40", remedy)
        assert config.optim.decay_samples == 320
        assert rates(config, 18, samples)[:2] == rates(before, 18, samples)
        assert rates(config, 18, samples)[2:] == [pytest.approx(3e-4)] * 20
        assert [line for line in said if "WARNING" in line] == []


@pytest.mark.parametrize(
    "change",
    [
        "optim.lr=1e-3",
        "optim.min_lr=0",
        "optim.lr_schedule=linear",
        "optim.warmup_samples=300",
        "optim.decay_samples=170",
    ],
)
def test_every_key_of_the_curve_counts(tmp_path: Path, change: str) -> None:
    saved(tmp_path, 8)
    said = Told()
    start(tmp_path, said, change)
    key = change.split("=")[0]
    assert len(said) == 1
    assert "WARNING: the learning rate changes from " in said[0]
    assert f"{key} " in said[0]
    with pytest.raises(ConfigError, match=f"{key}=.* and optim.lr_on_resume=keep contradict each other: the saved run"):
        start(tmp_path, said, change, "optim.lr_on_resume=keep")


def test_a_ramp_is_counted_from_where_the_run_stands(tmp_path: Path) -> None:
    ramp = ["train.ramp_start=2", "train.ramp_samples=60"]
    _, samples = saved(tmp_path, 4, *ramp)
    config = start(tmp_path, Told(), *ramp, "train.global_batch_size=8")
    used = samples
    for _ in range(16):
        used += batch_size(config.train, config.parallel.dp, used)
    assert config.optim.decay_samples == used


def test_keep_at_the_first_start_and_in_warmup_changes_nothing(tmp_path: Path) -> None:
    said = Told()
    plain, kept = start(tmp_path, said), start(tmp_path, said, "optim.lr_on_resume=keep")
    assert dataclasses.replace(kept.optim, lr_on_resume="new") == plain.optim
    saved(tmp_path, 2, "optim.warmup_samples=100")
    start(tmp_path, said, "optim.warmup_samples=100", "train.steps=40")
    assert said == []


def test_a_run_continued_elsewhere_is_told_too(tmp_path: Path) -> None:
    saved(tmp_path / "old", 10)
    said = Told()
    load = f"checkpoint.load={tmp_path / 'old'}"
    start(tmp_path / "new", said, load, "train.steps=40")
    assert "from 0.00165 to 0.0026 at step 11" in said[0]
    assert start(tmp_path / "new", said, load, "checkpoint.load_optim=false").optim.decay_samples == 320
    assert len(said) == 1


@pytest.mark.parametrize(("before", "after", "steps"), [(16, 16, 13), (16, 4, 20), (4, 16, 20)])
def test_epochs_count_what_was_used(tmp_path: Path, before: int, after: int, steps: int) -> None:
    # two passes over 100 samples: 16 x 13; 16 x 10 and 4 x 10; 4 x 10 and 16 x 10
    saved(tmp_path, 10, f"train.global_batch_size={before}")
    request = asked(tmp_path, f"train.global_batch_size={after}", "train.epochs=2")
    config = with_epochs(resolve(request.config, 1), request, 100, 1, Told())
    assert config.train.steps == steps
    begun = progress_of(config)
    assert begun is not None
    assert begun.samples + (steps - 10) * after >= 200


def test_epochs_that_never_end(capsys: pytest.CaptureFixture[str]) -> None:
    request = parse_command_line(["train.epochs=1000000"], default_preset="tiny", prog="test")
    config = resolve(request.config, 4)
    with pytest.raises(
        ConfigError, match=r"train\.epochs=1e\+06 of 1000000 samples are 31250000000 steps, more than 1e\+09"
    ):
        with_epochs(config, request, 10**6, 4, print)
    assert with_epochs(config, request, 64, 4, print).train.steps == 2 * 10**6
