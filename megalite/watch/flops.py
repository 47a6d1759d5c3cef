"""What a GPU can do at most, by its name, and how much of that a run uses.

Figures are dense, without sparsity, in TFLOP/s of one device as torch counts devices, from the vendors' data sheets:
NVIDIA A100, A800, A10, A30, A40, L4, L40, L40S, T4, V100, H100 (SXM, PCIe, NVL), H200, H20, GH200, HGX B100/B200 and
GB200 NVL72; the architecture white papers of GA102, AD102 and GB202 for RTX (fp32 accumulation); AMD Instinct MI210,
MI250, MI250X, MI300X, MI325X and MI355X. Where a sheet gives only the figure with sparsity, half of it.
"""

from __future__ import annotations

import re
import resource
import sys

import torch

# name: fp16, bf16, tf32, fp32 (matrix cores where torch uses them for fp32); None: not there, or not published
PEAKS: dict[str, tuple[float | None, float | None, float | None, float | None]] = {
    "V100": (112, None, None, 14.0),  # PCIe, the slowest
    "V100-SXM2": (125, None, None, 15.7),
    "V100-SXM3": (125, None, None, 15.7),
    "V100S": (130, None, None, 16.4),
    "T4": (65, None, None, 8.1),
    "A10": (125, 125, 62.5, 31.2),
    "A10G": (70, 70, 35, 31.5),
    "A30": (165, 165, 82, 10.3),
    "A40": (149.7, 149.7, 74.8, 37.4),
    "A100": (312, 312, 156, 19.5),
    "A800": (312, 312, 156, 19.5),
    "RTX A6000": (154.8, 154.8, 77.4, 38.7),
    "RTX 6000 Ada": (364.2, 364.2, 182.1, 91.1),
    "RTX 3090": (71, 71, 35.6, 35.6),
    "RTX 3090 Ti": (80, 80, 40, 40),
    "RTX 4090": (165.2, 165.2, 82.6, 82.6),
    "RTX 4090 D": (147.1, 147.1, 73.5, 73.5),
    "RTX 5090": (209.5, 209.5, 104.8, 104.8),
    "L4": (121, 121, 60, 30.3),
    "L40": (181, 181, 90.5, 90.5),
    "L40S": (362, 362, 183, 91.6),
    "H20": (148, 148, 74, 44),
    "H100": (989.4, 989.4, 494.7, 66.9),
    "H100 PCIe": (756.5, 756.5, 378, 51.2),
    "H100 NVL": (835.5, 835.5, 417.5, 60),
    "H800": (989.4, 989.4, 494.7, 66.9),
    "H800 PCIe": (756.5, 756.5, 378, 51.2),
    "H200": (989.4, 989.4, 494.7, 66.9),
    "H200 NVL": (835.5, 835.5, 417.5, 60),
    "GH200": (989.4, 989.4, 494.7, 66.9),
    "B100": (1750, 1750, 875, 60),
    "B200": (2250, 2250, 1125, 75),
    "GB200": (2500, 2500, 1250, 80),
    "MI210": (181, 181, None, 45.3),
    # one device is one of the card's two dies
    "MI250": (181, 181, None, 45.3),
    "MI250X": (191.5, 191.5, None, 47.9),
    "MI300X": (1307.4, 1307.4, 653.7, 163.4),
    "MI325X": (1307.4, 1307.4, 653.7, 163.4),
    "MI355X": (2516.6, 2516.6, None, 157.3),
}
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
# a slice of a GPU, or one held back by its case: the name says nothing of its speed
NOT_WHOLE = re.compile(r"\b(MIG|vGPU|GRID|Laptop|Max-Q)\b", re.IGNORECASE)


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s at most of the device `name` (as torch or NVML spell it), None where it is not known.

    `precision`: fp16, bf16, tf32 or fp32. Of several names that fit the longest counts.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    989400000000000.0
    """
    if precision not in PRECISIONS or NOT_WHOLE.search(name):
        return None
    fits = [known for known in PEAKS if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE)]
    peak = PEAKS[max(fits, key=len)][PRECISIONS.index(precision)] if fits else None
    return peak * 1e12 if peak is not None else None


class Meter:
    """Turns a run's tokens per second into what one rank does with its device.

    MFU as Megatron and PaLM count it: FLOPs that the model needs, recomputation not counted, over the peak's.
    """

    def __init__(self, flops_per_token: float, ranks: int, device: torch.device, dtype: str) -> None:
        self._flops_per_token, self._ranks, self._device = flops_per_token, ranks, device
        self._peak: float | None = None
        if device.type == "cuda":
            tf32 = dtype == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32"
            self._peak = peak_flops(torch.cuda.get_device_name(device), "tf32" if tf32 else dtype)

    def read(self, tokens_per_s: float) -> dict[str, float]:
        """`tflops_per_rank`, `mfu` where the peak is known, and this rank's `peak_memory_gib` (CUDA, or resident)."""
        flops = self._flops_per_token * tokens_per_s / self._ranks
        found = {"tflops_per_rank": flops / 1e12, "peak_memory_gib": self._peak_memory() / 2**30}
        return found | ({"mfu": flops / self._peak} if self._peak else {})

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(reading: dict[str, float]) -> str:
    """The reading in a word or two: `mfu 41.3%`, else `12.3 GFLOP/s/rank`."""
    if "mfu" in reading:
        return f"mfu {reading['mfu']:.1%}"
    tera = reading["tflops_per_rank"]
    return f"{tera:.1f} TFLOP/s/rank" if tera >= 1 else f"{tera * 1e3:.1f} GFLOP/s/rank"
