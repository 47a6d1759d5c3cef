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
        ("a100", "gpu=a100: A100 comes in several sizes; write gpu=a100-40 or gpu=a100-80"),
        ("h1000", "gpu=h1000 is not known; write its memory in GiB, e.g. gpu=80, or "),
        ("3000", "gpu=3000: GiB of a GPU must be at least 1 and at most 2048, e.g. gpu=80"),
        ("a100-60", "gpu=a100-60 is not known"),
    ],
)
def test_a_gpu_that_is_not_known(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        gpu_gib(text)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA A800-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 31.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756.5, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA H20", 148, 44),
        ("NVIDIA H800", 989.4, 66.9),
        ("NVIDIA GH200 480GB", 989.4, 66.9),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 3090 Ti", 80, 40),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
        ("AMD Instinct MI250X", 191.5, 47.9),
        ("AMD Instinct MI300X", 1307.4, 163.4),
    ],
)
def test_names_as_torch_spells_them(name: str, bf16: float, fp32: float) -> None:
    assert peak_flops(name, "bf16") == pytest.approx(bf16 * 1e12)
    assert peak_flops(name, "fp32") == pytest.approx(fp32 * 1e12)


def test_volta_has_fp16_and_no_bf16() -> None:
    assert peak_flops("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert peak_flops("Tesla V100-PCIE-16GB", "fp16") == 112e12
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",  # no A100
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "GRID A100-10C",
        "NVIDIA Future 1",
        "",
    ],
)
def test_unknown_or_not_whole(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_no_peak_of_other_precisions() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp64") is None


def test_the_table_is_in_order_of_precision() -> None:
    for name, (_, (fp16, bf16, tf32, fp32)) in GPUS.items():
        assert bf16 in (fp16, None), name
        assert (fp16 or 0) >= (tf32 or 0), name
        assert (tf32 or fp32 or 0) >= (fp32 or 0) > 0, name
