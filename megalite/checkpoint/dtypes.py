"""The rows of config/dtypes.py as torch's dtypes, and back."""

import torch

from megalite.config.dtypes import BY_TORCH, DType


def to_torch(row: DType) -> torch.dtype:
    """torch's dtype of a row of DTYPES."""
    dtype: torch.dtype = getattr(torch, row.torch)
    return dtype


def from_torch(dtype: torch.dtype) -> DType:
    """The row of torch's `dtype`. Raises ValueError if there is none."""
    name = str(dtype).removeprefix("torch.")
    if name not in BY_TORCH:
        raise ValueError(f"{name} is not supported; use {', '.join(BY_TORCH)}")
    return BY_TORCH[name]
