"""Merged weights compute what base and factors compute together."""

import dataclasses
from pathlib import Path

from lora_runs import folder, make_config, ours, theirs
from parity import batches
from torch import Tensor

from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import read_tensor
from megalite.config import TuneConfig
from megalite.engine.engine import build
from megalite.exchange.merge import merged
from megalite.model.layouts import from_hf
from megalite.parallel.groups import SoloWorld


def test_merged_is_unmerged_in_float64(root: Path, tmp_path: Path) -> None:
    source, run_dir = folder("Llama", root), tmp_path / "run"
    weights = {key: p.detach().double() for key, p in theirs(source).named_parameters()}
    config = make_config(source, run_dir, {})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="fp64"))
    ours(config, weights, run_dir)
    step = run_dir / "checkpoints" / "step-00000020"
    manifest = read_manifest(step)

    # the base is fp32 on disk; here it is as wide as it ran
    def get(name: str) -> Tensor:
        if ".lora_" in name:
            return read_tensor(step, manifest, f"weight.{name}")
        return from_hf(weights.__getitem__, name, config.model)

    plain, inside = dataclasses.replace(config, tune=TuneConfig()), merged(config, get)
    beside = build(config, SoloWorld(), lambda name, shape: get(name)).evaluate(batches(False))["loss"]
    without = build(plain, SoloWorld(), lambda name, shape: get(name)).evaluate(batches(False))["loss"]
    together = build(plain, SoloWorld(), lambda name, shape: inside(name)).evaluate(batches(False))["loss"]
    assert abs(together - beside) <= 1e-12 * beside < 1e-3 * abs(without - beside)
