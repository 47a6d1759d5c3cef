"""A rank reads from a Hugging Face folder exactly what its shard holds."""

import pytest
import torch
from folders import FAMILIES, Make

from megalite.config.shapes import shapes
from megalite.exchange.hf_folder import open_folder
from megalite.exchange.hf_weights import read_local, read_whole
from megalite.model.cut_table import shard_of


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [2, 4])
def test_a_rank_reads_what_its_shard_says(family: str, tp: int, folder_of: Make) -> None:
    folder = open_folder(folder_of(family))
    for name, shape in shapes(folder.model).items():
        whole = read_whole(folder, name)
        assert tuple(whole.shape) == shape
        for rank in range(tp):
            shard = shard_of(name, shape, folder.model, tp, rank)
            assert torch.equal(read_local(folder, name, shard), shard.cut(whole)), (name, rank)
