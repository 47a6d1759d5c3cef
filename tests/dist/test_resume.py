"""A run goes on from its checkpoint as if it had never stopped, at any topology, or says why it cannot."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import different, pretrain, refused, run_ranks, save_untrained, whole_tensors

from megalite.checkpoint.folder import complete
from megalite.watch.metrics import read_metrics

CUT = {
    "single": (1, []),
    "dp2": (2, ["parallel.dp=2"]),
    "dp2zero": (2, ["parallel.dp=2", "parallel.zero=1"]),
    "tp2pp2": (4, ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=4"]),
    "dropout": (2, ["parallel.dp=2", "parallel.zero=1", "model.dropout=0.1", "model.attention_dropout=0.1"]),
}
# a learning rate that changes from step to step, so that a wrong step shows
CURVE = ["optim.lr_schedule=cosine", "optim.decay_samples=160"]

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(settings, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains `topology` to `steps` in a new folder or in `run_dir`; a run in a new folder is made only once."""
    known: dict[tuple, Path] = {}

    def _train(topology: str, steps: int, *more: str, run_dir: Path | None = None) -> Path:
        key = (topology, steps, *more)
        if run_dir is not None or key not in known:
            ranks, cuts = CUT[topology]
            folder = run_dir or tmp_path_factory.mktemp("run")
            run_ranks(ranks, pretrain, settings(folder, *CURVE, *cuts, f"train.steps={steps}", *more))
            if run_dir is not None:
                return folder
            known[key] = folder
        return known[key]

    return _train


@pytest.fixture
def half(train: Train, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run of ten steps, to be changed at will."""
    return lambda topology: Path(shutil.copytree(train(topology, 10), tmp_path / topology))


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir)["train"]}


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of everything in a folder."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("topology", ["single", "tp2pp2", "dp2zero", "dropout"])
def test_resuming_changes_no_bit(train: Train, half: Callable[[str], Path], topology: str) -> None:
    straight, resumed = train(topology, 20), train(topology, 20, run_dir=half(topology))
    assert losses(resumed) == losses(straight)
    assert different(whole_tensors(checkpoint(resumed, 20)), whole_tensors(checkpoint(straight, 20))) == []

    rows = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 21))
    assert [row["at_step"] for row in rows if row["kind"] == "start"] == [0, 10]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 10, 20]


@pytest.mark.parametrize(
    ("saved", "loaded"), [("tp2pp2", "single"), ("tp2pp2", "dp2zero"), ("dp2zero", "tp2pp2"), ("single", "dp2zero")]
)
def test_a_checkpoint_loads_at_another_topology(
    settings, train: Train, tmp_path: Path, saved: str, loaded: str
) -> None:
    source = checkpoint(train(saved, 10), 10)
    ranks, cuts = CUT[loaded]
    run_ranks(ranks, save_untrained, settings(tmp_path / "again", *cuts), source)
    assert different(whole_tensors(checkpoint(tmp_path / "again", 10)), whole_tensors(source)) == []

    resumed = losses(train(loaded, 20, f"checkpoint.load={source}"))
    straight = losses(train(saved, 20))
    assert list(resumed) == list(range(11, 21))
    assert [step for step, loss in resumed.items() if abs(loss - straight[step]) > 1e-5 * straight[step]] == []


def test_weights_alone_start_a_new_run(train: Train) -> None:
    source = train("single", 10)
    run_dir = train("single", 3, f"checkpoint.load={source}", "checkpoint.load_optim=false")
    old, new = read_metrics(source), read_metrics(run_dir)
    assert new["start"][0]["at_step"] == 0
    assert new["eval"][0]["step"] == 0
    assert new["eval"][0]["loss"] == old["eval"][-1]["loss"]
    assert [row["lr"] for row in new["train"]] == [row["lr"] for row in old["train"][:3]]
    assert [row["samples"] for row in new["train"]] == [8, 16, 24]


def test_only_the_newest_checkpoints_are_kept(train: Train) -> None:
    run_dir = train("tp2pp2", 7, "checkpoint.interval=2", "checkpoint.keep=2")
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["latest", "step-00000006", "step-00000007"]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000007\n"


def test_every_nth_checkpoint_is_kept_for_good(train: Train) -> None:
    run_dir = train("single", 9, "checkpoint.interval=1", "checkpoint.keep=1", "checkpoint.keep_every=4")
    assert [folder.name for folder in complete(run_dir)] == [f"step-{step:08d}" for step in (4, 8, 9)]


def test_a_finished_run_is_left_alone(settings, half: Callable[[str], Path]) -> None:
    run_dir = half("tp2pp2")
    before = files(run_dir)
    ranks, cuts = CUT["tp2pp2"]
    ended = run_ranks(ranks, pretrain, settings(run_dir, *CURVE, *cuts, "train.steps=10"))
    assert f"{run_dir} is complete: step 10 of 10" in ended.out[0]
    assert "".join(ended.out[1:]) == "".join(ended.err) == ""
    assert files(run_dir) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model.ffn_hidden_size=96", "holds another model: model.ffn_hidden_size is 64 there and 96 here"),
        ("checkpoint.resume=never", "is not empty and checkpoint.resume=never"),
        ("checkpoint.resume=must train.run_dir=/nonexistent", "checkpoint.resume=must, but /nonexistent has no"),
    ],
)
def test_what_must_not_be_resumed_is_refused_in_one_line(
    settings, half: Callable[[str], Path], more: str, message: str
) -> None:
    run_dir = half("tp2pp2")
    before = files(run_dir)
    refused(settings(run_dir, *CURVE, "parallel.tp=2", "train.steps=20", *more.split()), message)
    assert files(run_dir) == before


def flip(path: Path) -> None:
    """One bit of the last tensor."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def damage(checkpoint: Path, what: str) -> str:
    """Damage a checkpoint in a file or its manifest; gives how the message about it begins."""
    if what == "manifest":
        path = checkpoint / "manifest.json"
        path.write_text(path.read_text().replace('"consumed_samples": ', '"consumed_samples": 1'))
        return f"{path}: not a manifest (it was changed after it was written"
    path = checkpoint / f"rank-{what}-000.safetensors"
    flip(path)
    return f"{path}: tensor exp_avg_sq."


@pytest.mark.parametrize("resume", ["auto", "must"])
@pytest.mark.parametrize("spoilt", [["00001"], ["manifest"], ["00000", "manifest"], ["manifest", "00002"]])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    settings, train: Train, tmp_path: Path, spoilt: list[str], resume: str
) -> None:
    """`spoilt`: what is damaged of each, the newest first."""
    every_third = ["checkpoint.interval=3", "checkpoint.keep=3", "optim.decay_samples=160"]
    run_dir = Path(shutil.copytree(train("tp2pp2", 10, *every_third), tmp_path / "run"))
    assert [int(folder.name[-2:]) for folder in complete(run_dir)] == [6, 9, 10]
    told = [damage(checkpoint(run_dir, step), what) for step, what in zip((10, 9), spoilt)]
    ranks, cuts = CUT["tp2pp2"]
    argv = settings(run_dir, *CURVE, *cuts, *every_third, "train.steps=20", f"checkpoint.resume={resume}")
    ended = run_ranks(ranks, pretrain, argv)
    for words in told:
        assert words in ended.out[0]
    good = 9 if len(spoilt) == 1 else 6
    assert f"loaded {checkpoint(run_dir, good)}, at step {good}" in ended.out[0]
    aside = sorted(path.name for path in (run_dir / "checkpoints").glob("damaged-*"))
    assert aside == [f"damaged-1-step-{step:08d}" for step in (9, 10)[-len(spoilt) :]]
    straight = train("tp2pp2", 20)
    assert losses(run_dir) == losses(straight)
    assert different(whole_tensors(checkpoint(run_dir, 20)), whole_tensors(checkpoint(straight, 20))) == []


@pytest.mark.parametrize("what", ["00003", "manifest"])
def test_where_all_are_damaged_each_is_named(settings, train: Train, tmp_path: Path, what: str) -> None:
    run_dir = Path(shutil.copytree(train("tp2pp2", 7, "checkpoint.interval=2", "checkpoint.keep=2"), tmp_path / "run"))
    told = [damage(checkpoint(run_dir, step), what) for step in (7, 6)]
    before = files(run_dir / "checkpoints")
    argv = settings(run_dir, *CURVE, *CUT["tp2pp2"][1], "train.steps=20")
    for words in told:
        refused(argv, words, ranks=4)
    assert files(run_dir / "checkpoints") == before


def test_unverified_blocks_are_loaded_as_they_are(settings, half: Callable[[str], Path]) -> None:
    run_dir = half("single")
    damage(checkpoint(run_dir, 10), "00000")
    argv = settings(run_dir, *CURVE, "train.steps=12")
    refused(argv, "do not match their checksum", ranks=1)
    run_ranks(1, pretrain, [*argv, "checkpoint.verify=false"])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garble(path: Path) -> None:
    path.write_bytes(os.urandom(1000))


@pytest.mark.parametrize("spoil", [truncate, garble, Path.unlink])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_damaged_file_is_named_in_one_line(
    settings, half: Callable[[str], Path], spoil: Callable[[Path], None], rank: int
) -> None:
    run_dir = half("tp2pp2")
    shard = checkpoint(run_dir, 10) / f"rank-{rank:05d}-000.safetensors"
    spoil(shard)
    refused(settings(run_dir, *CURVE, *CUT["tp2pp2"][1], "train.steps=20"), f"{shard}: tensor", ranks=4)
