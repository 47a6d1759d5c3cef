"""The dtypes of weights: one row each, by the name that configuration and commands use. No torch here."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One dtype: `name` in train.dtype and --dtype, `torch` in torch and manifests, `code` in safetensors headers.

    `bytes` per element; `wide` is the name of the dtype in which the optimizer keeps masters and moments.
    """

    name: str
    torch: str
    code: str
    bytes: int
    wide: str


DTYPES = {
    row.name: row
    for row in (
        DType("fp32", "float32", "F32", 4, "fp32"),
        DType("bf16", "bfloat16", "BF16", 2, "fp32"),
        DType("fp16", "float16", "F16", 2, "fp32"),
        DType("fp64", "float64", "F64", 8, "fp64"),
    )
}
BY_TORCH = {row.torch: row for row in DTYPES.values()}
BY_CODE = {row.code: row for row in DTYPES.values()}
