"""GPUs by name: memory for a plan, and peak FLOP/s."""

import re

import pytest

from megalite.config import ConfigError
from megalite.plan.hardware import GPUS, gpu_gib, peak_flops


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("80", 80), ("23.5", 23.5), ("80GB", 80), ("40 GiB", 40), ("h100", 79.6), ("H100-80GB", 79.6),
        ("NVIDIA H100 80GB HBM3", 79.6), ("a100-40", 40), ("A100-SXM4-80GB", 80), ("rtx 4090", 24), ("4090", 24),
        ("h200", 140.4), ("H200-141GB", 140.4), ("l40s", 45), ("V100-32GB", 32), ("b200", 179), ("l4", 22.5),
    ],
)  # fmt: skip
def test_gpus_by_name(text: str, gib: float) -> None:
    assert gpu_gib(text) == gib


def test_every_gpu_of_the_table_can_be_named() -> None:
    for name, (sizes, _) in GPUS.items():
        for size in sizes:
            assert gpu_gib(f"{name}-{size:g}" if len(sizes) > 1 else name) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100", "gpu=a100: there are A100 of several sizes; write gpu=a100-40 or gpu=a100-80"),
        ("h1000", "gpu=h1000 is not known; write its memory in GiB, e.g. gpu=80, or "),
        ("3000", "gpu=3000: GiB of a GPU must be at least 1 and at most 2048, e.g. gpu=80"),
        ("a100-60", "gpu=a100-60 is not known"),
    ],
)
def test_a_gpu_that_is_not_known(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        gpu_gib(text)


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA GeForce RTX 4090 D", "fp16", 147.1),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),  # it has none
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),  # a slice: the name does not say of what speed
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp8", None),
    ],
)
def test_the_longest_name_that_fits_counts(name: str, precision: str, teraflops: float | None) -> None:
    assert peak_flops(name, precision) == (None if teraflops is None else teraflops * 1e12)
