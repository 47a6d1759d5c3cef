"""Loading fills what a rank holds, and refuses tensors that are missing or of another shape."""

from pathlib import Path

import pytest
import torch
from checkpoints import TENSORS, write_tensors

from megalite.checkpoint.folder import read_manifest
from megalite.checkpoint.load import load, read_tensor
from megalite.parallel.cuts import even, uncut

pytestmark = pytest.mark.usefixtures("any_tensors")


@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_gets_its_rows_or_columns(tmp_path: Path, dim: int) -> None:
    folder = write_tensors(tmp_path / "w")
    whole = TENSORS["weight.embed.weight"]
    for rank in range(2):
        shard = even((20, 30), dim, 2, rank)
        local = torch.full(shard.local_shape, -1.0)
        load(folder, read_manifest(folder), {"embed.weight": shard}, {"weight": {"embed.weight": local}})
        assert torch.equal(local, whole.chunk(2, dim)[rank])


def test_a_span_of_the_flattened_tensor(tmp_path: Path) -> None:
    """As ZeRO holds it: from the middle of one row to the middle of another."""
    folder = write_tensors(tmp_path / "w")
    part = torch.zeros(250)
    kinds, spans = {"weight": {"embed.weight": part}}, {"embed.weight": range(100, 350)}
    load(folder, read_manifest(folder), {"embed.weight": uncut((20, 30), 0)}, kinds, spans)
    assert torch.equal(part, TENSORS["weight.embed.weight"].flatten()[100:350])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_tensors(tmp_path / "w")
    manifest = read_manifest(folder)
    shards = {"embed.weight": uncut((20, 31), 0), "other": uncut((2,), 0), "wide": uncut((2, 50), 0)}
    with pytest.raises(ValueError, match=r"embed.weight has shape \[20, 30\], this model needs \[20, 31\]"):
        load(folder, manifest, shards, {"weight": {"embed.weight": torch.zeros(20, 31)}})
    with pytest.raises(ValueError, match=r"has no tensor weight.other; it is a checkpoint of another model$"):
        load(folder, manifest, shards, {"weight": {"other": torch.zeros(2)}})
    with pytest.raises(ValueError, match=r"has no tensor exp_avg.wide; .* another optimizer; take its weights alone"):
        load(folder, manifest, shards, {"exp_avg": {"wide": torch.zeros(2, 50)}})
    with pytest.raises(ValueError, match=r"has no tensor weight.none$"):
        read_tensor(folder, manifest, "weight.none")
