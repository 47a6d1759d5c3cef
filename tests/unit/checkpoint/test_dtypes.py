"""The rows of the dtype table against torch and the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megalite.checkpoint.dtypes import from_torch, to_torch
from megalite.config.dtypes import DTYPES


@pytest.mark.parametrize("name", DTYPES)
def test_a_row_is_torchs_dtype(name: str, tmp_path: Path) -> None:
    row = DTYPES[name]
    dtype = to_torch(row)
    assert from_torch(dtype) == row
    assert torch.finfo(dtype).bits == 8 * row.bytes
    assert to_torch(DTYPES[row.wide]) == torch.promote_types(dtype, torch.float32)
    save_file({"x": torch.zeros(2, dtype=dtype)}, tmp_path / "x")
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.get_slice("x").get_dtype() == row.code


def test_a_dtype_that_no_file_holds() -> None:
    with pytest.raises(ValueError, match=r"^int8 is not supported; use float32, bfloat16, float16, float64$"):
        from_torch(torch.int8)
