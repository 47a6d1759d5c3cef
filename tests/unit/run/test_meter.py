"""Peaks by name, and what a run makes of them."""

import pytest
import torch

from megalite.config import ModelConfig
from megalite.plan.counts import training_flops
from megalite.plan.hardware import GPUS, peak_flops
from megalite.run.meter import Meter, describe

CPU = torch.device("cpu")


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


def test_meter_on_a_cpu() -> None:
    per_token = training_flops(ModelConfig(num_kv_heads=4, head_dim=32), 256)
    reading = Meter(per_token, 4, CPU, "fp32").read(1000.0)
    assert reading["tflops_per_rank"] == pytest.approx(per_token * 1000 / 4 / 1e12)
    assert 0.05 < reading["peak_memory_gib"] < 1000
    assert "mfu" not in reading


def test_meter_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    cuda = torch.device("cuda", 0)
    # a 7B model at 3300 tokens/s and GPU, about half of an A100
    reading = Meter(4.5e10, 8, cuda, "bf16").read(8 * 3300.0)
    assert reading == {
        "tflops_per_rank": pytest.approx(148.5),
        "mfu": pytest.approx(148.5 / 312),
        "peak_memory_gib": 3.0,
    }
    assert Meter(1e12, 1, cuda, "fp32").read(1.95)["mfu"] == pytest.approx(0.1)
    torch.set_float32_matmul_precision("high")
    try:
        assert Meter(1e12, 1, cuda, "fp32").read(15.6)["mfu"] == pytest.approx(0.1)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "mfu" not in Meter(1e12, 1, cuda, "fp64").read(1.0)


def test_description() -> None:
    assert describe({"tflops_per_rank": 128.9, "mfu": 0.413}) == "mfu 41.3%"
    assert describe({"tflops_per_rank": 128.94}) == "128.9 TFLOP/s/rank"
    assert describe({"tflops_per_rank": 0.0123}) == "12.3 GFLOP/s/rank"
