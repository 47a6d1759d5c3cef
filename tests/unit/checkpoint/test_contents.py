"""A checkpoint is whole by what its configuration needs, whatever it lists; so what runs write has to be just that."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from models import tiny

from megalite.checkpoint import save as save_module
from megalite.checkpoint.folder import complete, read_manifest
from megalite.checkpoint.manifest import Damaged, digest
from megalite.checkpoint.save import SaveFailed, save
from megalite.checkpoint.state import State
from megalite.config import (
    Config,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    TuneConfig,
    check,
    resolve,
)
from megalite.engine.engine import build
from megalite.parallel.groups import World
from megalite.parallel.threads import run_threads
from tools.checkpoint import main

TOPOLOGIES = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "pp2": ParallelConfig(pp=2),
    "dp2zero": ParallelConfig(dp=2, zero=1),
    "tp4": ParallelConfig(tp=4),  # two replicas of each kv head, a padded vocabulary
    "tp2pp2dp2zero": ParallelConfig(tp=2, pp=2, dp=2, zero=1),
}
LLAMA = tiny(qkv_bias=True)
TIED = dataclasses.replace(LLAMA, tie_embeddings=True, qk_norm=True)
GPT2 = tiny(
    qkv_bias=True, position="learned", norm="layernorm", activation="gelu", linear_bias=True, tie_embeddings=True
)
MUON, LORA = OptimConfig(name="muon"), TuneConfig(mode="lora", lora_rank=2, lora_targets="q_proj v_proj mlp.down")
KINDS: dict[str, Config] = {
    "llama": Config(LLAMA),
    "tied, bf16": Config(TIED, train=TrainConfig(dtype="bf16")),
    "tied, fp16": Config(TIED, train=TrainConfig(dtype="fp16")),
    "fp64": Config(LLAMA, train=TrainConfig(dtype="fp64")),
    "gpt2": Config(GPT2),
    "muon": Config(LLAMA, optim=MUON),
    "muon, gpt2, bf16": Config(GPT2, optim=MUON, train=TrainConfig(dtype="bf16")),
    "muon, ffn_only": Config(LLAMA, optim=MUON, tune=TuneConfig(mode="ffn_only")),
    "lora": Config(LLAMA, tune=LORA),
    "lora, bf16": Config(TIED, tune=LORA, train=TrainConfig(dtype="bf16")),
    "lora, frozen": Config(LLAMA, tune=dataclasses.replace(LORA, freeze="layers.0.*")),
    "bitfit": Config(LLAMA, tune=TuneConfig(mode="bitfit")),
    "frozen": Config(TIED, tune=TuneConfig(freeze="embed.* layers.1.attn.*"), train=TrainConfig(dtype="bf16")),
}


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def config(kind: str, topology: str) -> Config:
    c, t = KINDS[kind], TOPOLOGIES[topology]
    train = dataclasses.replace(c.train, seq_len=8, micro_batch_size=1, global_batch_size=2)
    parallel = dataclasses.replace(t, sp=False, bucket_mb=0.005)
    checkpoint = dataclasses.replace(c.checkpoint, load="base" if c.tune.mode == "lora" else None)
    ranks = (t.tp or 1) * (t.pp or 1) * (t.dp or 1)
    found = resolve(dataclasses.replace(c, parallel=parallel, train=train, checkpoint=checkpoint), ranks)
    check(found, ranks)
    return found


def write(folders: list[Path], kind: str, topology: str, step: int = 3) -> Path:
    """A checkpoint of untrained weights; of rank n in folder n, of all ranks in the only one."""
    c = config(kind, topology)
    values = dataclasses.asdict(State(step=step, consumed_samples=2 * step))

    def one(world: World) -> Path:
        engine = build(c, world)
        run_dir = folders[world.rank % len(folders)]
        return save(run_dir, c, engine.mesh, engine.shards, engine.spans(), engine.state(), values)

    assert c.parallel.tp
    assert c.parallel.pp
    assert c.parallel.dp
    return run_threads(c.parallel.tp * c.parallel.pp * c.parallel.dp, one)[0]


def without(folder: Path, names: list[str]) -> None:
    """The same manifest but for tensors that it no longer lists, with a digest that agrees."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in names:
        del manifest["tensors"][name]
    manifest["digest"] = digest(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_writes_what_its_configuration_needs(tmp_path: Path, kind: str, topology: str) -> None:
    folder = write([tmp_path], kind, topology)
    manifest = read_manifest(folder)
    text = (folder / "manifest.json").read_text()
    # of every kind the first and the last tensor, and all of it
    kinds = {name.partition(".")[0] for name in manifest["tensors"]}
    assert kinds >= {"weight"}
    for each in kinds:
        names = sorted(name for name in manifest["tensors"] if name.startswith(f"{each}."))
        others = kinds - {each} != {"weight"}  # weights alone are whole, as after a conversion
        for gone in (names[:1], names[-1:], *([names] if others else [])):
            (folder / "manifest.json").write_text(text)
            without(folder, gone)
            with pytest.raises(Damaged, match=r"tensors that its configuration needs are missing, among them"):
                read_manifest(folder)


@pytest.mark.parametrize("topology", ["tp2", "pp2", "dp2zero", "tp2pp2dp2zero"])
def test_nothing_is_published_without_every_ranks_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, topology: str
) -> None:
    """Each rank on a disk of its own, as where train.run_dir is not shared: rank 0 does not see the others' parts."""
    monkeypatch.setattr(save_module, "SHOW_S", 0.2)
    t = TOPOLOGIES[topology]
    ranks = (t.tp or 1) * (t.pp or 1) * (t.dp or 1)
    folders = [tmp_path / f"node-{rank}" for rank in range(ranks)]
    missing = ", ".join(str(rank) for rank in range(1, ranks))
    says = rf"rank 0 cannot write the checkpoint of step 3: rank {missing} of {ranks} has written its part, but rank 0"
    with pytest.raises(SaveFailed, match=says) as error:
        write(folders, "llama", topology)
    assert error.value.remedy == "Put train.run_dir on a file system that all nodes share"
    assert [complete(folder) for folder in folders] == [[]] * ranks


def test_the_tool_and_loading_say_the_same_of_a_checkpoint_of_half_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As versions before this one published it from two disks: all that rank 0 has written, and nothing more."""
    folder = write([tmp_path], "llama", "pp2")
    tensors = read_manifest(folder)["tensors"]
    without(folder, [n for n, t in tensors.items() if any(b["file"].startswith("rank-00001") for b in t["blocks"])])
    with pytest.raises(Damaged) as error:
        read_manifest(folder)
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out == f"damaged  {error.value}\n"
    for verb in (["info", str(folder)], ["consolidate", str(folder), str(tmp_path / "new")]):
        assert main(verb) == 2
        assert capsys.readouterr().err == f"error: {error.value}\n"
