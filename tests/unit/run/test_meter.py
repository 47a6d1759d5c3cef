"""MFU and memory of a step, and their one line."""

import pytest
import torch

from megalite.config import ModelConfig, resolve_model
from megalite.plan.counts import training_flops
from megalite.run.meter import Meter, describe

CPU = torch.device("cpu")


def test_meter_on_a_cpu() -> None:
    per_token = training_flops(resolve_model(ModelConfig(), 256), 256)
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
