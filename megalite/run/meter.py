"""FLOP/s per rank, MFU and peak memory of a run."""

from __future__ import annotations

import resource
import sys

import torch

from megalite.plan.hardware import peak_flops


class Meter:
    """Converts a run's tokens per second into FLOP/s per rank and MFU.

    MFU as in Megatron and PaLM: the FLOPs that the model needs, without recomputation, divided by the device's peak.
    """

    def __init__(self, flops_per_token: float, ranks: int, device: torch.device, dtype: str) -> None:
        self._flops_per_token, self._ranks, self._device = flops_per_token, ranks, device
        self._peak: float | None = None
        if device.type == "cuda":
            tf32 = dtype == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
            self._peak = peak_flops(torch.cuda.get_device_name(device), "tf32" if tf32 else dtype)

    def read(self, tokens_per_s: float) -> dict[str, float]:
        """Return `tflops_per_rank`, `peak_memory_gib` of this rank (CUDA, else resident), and `mfu` if known."""
        flops = self._flops_per_token * tokens_per_s / self._ranks
        found = {"tflops_per_rank": flops / 1e12, "peak_memory_gib": self._peak_memory() / 2**30}
        return found | ({"mfu": flops / self._peak} if self._peak else {})

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(reading: dict[str, float]) -> str:
    """The reading as a short text: `mfu 41.3%`, else `12.3 GFLOP/s/rank`."""
    if "mfu" in reading:
        return f"mfu {reading['mfu']:.1%}"
    tera = reading["tflops_per_rank"]
    return f"{tera:.1f} TFLOP/s/rank" if tera >= 1 else f"{tera * 1e3:.1f} GFLOP/s/rank"
