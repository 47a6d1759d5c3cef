"""Options of the optimizer on real ranks: they resume to the last bit and do not depend on the topology."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from ranks import different, pretrain, refused, run_ranks, save_untrained, whole_tensors

from megalite.watch.metrics import read_metrics

RAMP = [
    *("train.steps=12", "train.micro_batch_size=1", "train.ramp_start=2", "train.ramp_samples=30"),
    *("optim.lr_schedule=wsd", "optim.wsd_decay_fraction=0.5", "optim.warmup_samples=8"),
    "optim.groups=embed.* lr_scale=0.5; *norm.weight weight_decay=0.1",
]
TOLERANCE = 1e-5
# Muon orthogonalises in bf16: a gradient that differs in its last bit may be rounded to another bf16
MUON_TOLERANCE = 1e-4


def train(settings: Any, run_dir: Path, ranks: int, more: Sequence[str]) -> list[dict[str, Any]]:
    run_ranks(ranks, pretrain, settings(run_dir, *more))
    return read_metrics(run_dir)["train"]


def test_ramp_groups_and_wsd_at_every_topology_and_after_a_stop(settings, tmp_path: Path) -> None:
    straight = train(settings, tmp_path / "straight", 1, RAMP)
    batches = [b["samples"] - a["samples"] for a, b in pairwise(straight)]
    assert straight[0]["samples"] == 2
    assert batches == sorted(batches)
    assert batches[-1] == 8
    assert len(set(batches)) > 4

    train(settings, tmp_path / "resumed", 1, [*RAMP, "train.steps=5", "optim.decay_samples=75"])
    resumed = train(settings, tmp_path / "resumed", 1, RAMP)
    for key in ("loss", "lr", "samples"):
        assert [row[key] for row in resumed] == [row[key] for row in straight]
    folders = [tmp_path / name / "checkpoints" / "step-00000012" for name in ("straight", "resumed")]
    assert different(*map(whole_tensors, folders)) == []

    for name, ranks, cuts in (
        ("tp2pp2", 4, ["parallel.tp=2", "parallel.pp=2"]),
        ("zero", 2, ["parallel.dp=2", "parallel.zero=1"]),
    ):
        cut = train(settings, tmp_path / name, ranks, [*RAMP, *cuts])
        if name == "zero":  # steps are multiples of 2 there
            assert all(row["samples"] % 2 == 0 for row in cut)
            continue
        worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(cut, straight))
        print(f"{name}: losses deviate by {worst:.1e}")
        assert worst <= TOLERANCE
        assert [row["samples"] for row in cut] == [row["samples"] for row in straight]


MUON = ["optim.name=muon", "train.steps=20", "optim.lr=3e-3"]
ZERO = ["parallel.tp=2", "parallel.dp=2", "parallel.zero=1"]


def test_muon_follows_one_process_and_resumes_to_the_bit(settings, tmp_path: Path) -> None:
    whole = train(settings, tmp_path / "single", 1, MUON)
    straight = train(settings, tmp_path / "straight", 4, [*MUON, *ZERO])
    replicated = train(settings, tmp_path / "replicated", 4, [*MUON, "parallel.tp=2", "parallel.dp=2"])
    worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(straight, whole))
    print(f"tp2 dp2 zero: losses deviate by {worst:.1e}; {whole[0]['loss']:.3f} to {whole[-1]['loss']:.3f}")
    assert worst <= MUON_TOLERANCE
    assert whole[-1]["loss"] < 0.95 * whole[0]["loss"]

    train(settings, tmp_path / "resumed", 4, [*MUON, *ZERO, "train.steps=9"])
    resumed = train(settings, tmp_path / "resumed", 4, [*MUON, *ZERO])
    found = {
        name: whole_tensors(tmp_path / name / "checkpoints" / "step-00000020")
        for name in ("straight", "resumed", "replicated")
    }
    for name, rows in (("resumed", resumed), ("replicated", replicated)):
        assert [row["loss"] for row in rows] == [row["loss"] for row in straight]
        assert different(found[name], found["straight"]) == [], name
    assert "momentum.layers.0.attn.qkv.weight" in found["straight"]
    assert "exp_avg.layers.0.attn.qkv.weight" not in found["straight"]

    argv = settings(tmp_path / "resumed", *ZERO, "train.steps=30")
    refused(argv, "it is a checkpoint of another optimizer; take its weights alone by checkpoint.load=", ranks=4)

    # and what was saved there goes on elsewhere
    source = tmp_path / "straight" / "checkpoints" / "step-00000020"
    run_ranks(2, save_untrained, settings(tmp_path / "pp2", *MUON, "parallel.pp=2"), source)
    assert different(whole_tensors(tmp_path / "pp2" / "checkpoints" / "step-00000020"), found["straight"]) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("optim.groups=layers.9.* lr_scale=0", "optim.groups: no parameter is named layers.9.*; did you mean layers."),
        ("optim.name=apex_adamw", "optim.name=apex_adamw needs NVIDIA apex with its CUDA extensions"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(settings, tmp_path: Path, more: str, message: str) -> None:
    refused(settings(tmp_path, "parallel.tp=2", more), message)
