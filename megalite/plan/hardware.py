"""Memory and peak FLOP/s of GPUs, by name. No torch here.

Peaks are dense, without sparsity, in TFLOP/s of one device as torch counts devices, from the vendors' data sheets:
NVIDIA A100, A800, A10, A30, A40, L4, L40, L40S, T4, V100, H100 (SXM, PCIe, NVL), H200, H20, GH200, HGX B100/B200 and
GB200 NVL72; the architecture white papers of GA102, AD102 and GB202 for RTX (fp32 accumulation); AMD Instinct MI210,
MI250, MI250X, MI300X, MI325X and MI355X. If a sheet gives only the figure with sparsity, the peak is half of it.

Memory is the total that the driver reports, in GiB: less than the nominal size if ECC or the driver reserves a part.
"""

from __future__ import annotations

import difflib
import re

from megalite.config import ConfigError
from megalite.config.values import Range, shown

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
# a slice of a GPU, or a laptop's: the name does not determine the speed
NOT_WHOLE = re.compile(r"\b(MIG|vGPU|GRID|Laptop|Max-Q)\b", re.IGNORECASE)
Peaks = tuple[float | None, float | None, float | None, float | None]
# name: GiB of each size that is sold; fp16, bf16, tf32, fp32 (matrix cores if torch uses them for fp32); None: not
# supported, or not published
GPUS: dict[str, tuple[tuple[float, ...], Peaks]] = {
    "V100": ((16, 32), (112, None, None, 14.0)),  # PCIe, the slowest
    "V100-SXM2": ((16, 32), (125, None, None, 15.7)),
    "V100-SXM3": ((32,), (125, None, None, 15.7)),
    "V100S": ((32,), (130, None, None, 16.4)),
    "T4": ((15,), (65, None, None, 8.1)),
    "A10": ((22.5,), (125, 125, 62.5, 31.2)),
    "A10G": ((22.5,), (70, 70, 35, 31.5)),
    "A30": ((24,), (165, 165, 82, 10.3)),
    "A40": ((45,), (149.7, 149.7, 74.8, 37.4)),
    "A100": ((40, 80), (312, 312, 156, 19.5)),
    "A800": ((40, 80), (312, 312, 156, 19.5)),
    "RTX A6000": ((48,), (154.8, 154.8, 77.4, 38.7)),
    "RTX 6000 Ada": ((48,), (364.2, 364.2, 182.1, 91.1)),
    "RTX 3090": ((24,), (71, 71, 35.6, 35.6)),
    "RTX 3090 Ti": ((24,), (80, 80, 40, 40)),
    "RTX 4090": ((24,), (165.2, 165.2, 82.6, 82.6)),
    "RTX 4090 D": ((24,), (147.1, 147.1, 73.5, 73.5)),
    "RTX 5090": ((31.8,), (209.5, 209.5, 104.8, 104.8)),
    "L4": ((22.5,), (121, 121, 60, 30.3)),
    "L40": ((45,), (181, 181, 90.5, 90.5)),
    "L40S": ((45,), (362, 362, 183, 91.6)),
    "H20": ((95.6,), (148, 148, 74, 44)),
    "H100": ((79.6,), (989.4, 989.4, 494.7, 66.9)),
    "H100 PCIe": ((79.6,), (756.5, 756.5, 378, 51.2)),
    "H100 NVL": ((93.6,), (835.5, 835.5, 417.5, 60)),
    "H800": ((79.6,), (989.4, 989.4, 494.7, 66.9)),
    "H800 PCIe": ((79.6,), (756.5, 756.5, 378, 51.2)),
    "H200": ((140.4,), (989.4, 989.4, 494.7, 66.9)),
    "H200 NVL": ((140.4,), (835.5, 835.5, 417.5, 60)),
    "GH200": ((95.6, 140.4), (989.4, 989.4, 494.7, 66.9)),
    "B100": ((179,), (1750, 1750, 875, 60)),
    "B200": ((179,), (2250, 2250, 1125, 75)),
    "GB200": ((185,), (2500, 2500, 1250, 80)),
    "MI210": ((64,), (181, 181, None, 45.3)),
    # one device is one of the card's two dies
    "MI250": ((64,), (181, 181, None, 45.3)),
    "MI250X": ((64,), (191.5, 191.5, None, 47.9)),
    "MI300X": ((192,), (1307.4, 1307.4, 653.7, 163.4)),
    "MI325X": ((256,), (1307.4, 1307.4, 653.7, 163.4)),
    "MI355X": ((288,), (2516.6, 2516.6, None, 157.3)),
}

GIB_OF_A_GPU = Range(1, 2048, 80)


def gpu_gib(text: str) -> float:
    """GiB of a GPU by a common name (h100, a100-80gb, "RTX 4090") or a number (80, 23.5, 80GiB).

    Raises ConfigError if the name is not known, or there are several sizes.
    """
    plain = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(?:gi?b|g)?", text.strip().lower())
    if plain and GIB_OF_A_GPU.holds(float(plain[1])):
        return float(plain[1])
    asked = _squashed(text)
    known = {name: sizes for name, (sizes, _) in GPUS.items()}
    for name, sizes in known.items():
        short = _squashed(name)
        if asked in (short, f"nvidia{short}", short.removeprefix("rtx")):
            if len(sizes) > 1:
                each = " or ".join(f"gpu={name.lower()}-{size:g}" for size in sizes)
                raise ConfigError(f"gpu={text}: {name} comes in several sizes; write {each}")
            return sizes[0]
        box = re.fullmatch(
            rf"(?:nvidia)?{short}(?:sxm[0-9]?|pcie)?([0-9]+(?:[.][0-9]+)?)(?:gi?b|g)?(?:hbm[0-9]e?)?", asked
        )
        # the nominal size is up to 8 % more than what the driver reports
        for size in sizes:
            if box and size * 0.99 <= float(box[1]) <= size * 1.08:
                return size
    if plain:
        raise ConfigError(f"gpu={shown(text)}: GiB of a GPU must be {GIB_OF_A_GPU}, e.g. gpu=80")
    near = difflib.get_close_matches(asked, {_squashed(name): name for name in known}, n=3, cutoff=0.7)
    names = [name.lower() for name in known if _squashed(name) in near] or ["a100-80", "h100", "h200", "rtx 4090"]
    raise ConfigError(f"gpu={shown(text)} is not known; write its memory in GiB, e.g. gpu=80, or {', '.join(names)}")


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9.]|geforce|tesla", "", name.lower())


def peak_flops(name: str, precision: str) -> float | None:
    """Peak FLOP/s of the device `name`, as torch or NVML spell it; None if it is not known.

    `precision`: fp16, bf16, tf32 or fp32. The longest name in the table that matches is used.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    989400000000000.0
    """
    if precision not in PRECISIONS or NOT_WHOLE.search(name):
        return None
    fits = [known for known in GPUS if re.search(rf"\b{re.escape(known)}\b", name, re.IGNORECASE)]
    peak = GPUS[max(fits, key=len)][1][PRECISIONS.index(precision)] if fits else None
    return peak * 1e12 if peak is not None else None
