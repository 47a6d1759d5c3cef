"""Loads the compiled ops and chooses between them and the torch reference."""

import functools
import importlib
import logging

import torch

_log = logging.getLogger(__name__)

BUILD_COMMAND = "pip install --no-build-isolation --no-deps -e ."

# Dtypes of the compiled kernels. CPUs have no fast float16 arithmetic, so float16 there uses torch.
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float64, torch.float16),
}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_OPS = ("causal_softmax", "rope")


def _load() -> str | None:
    """Register the compiled ops with torch; returns the reason if that fails, else None."""
    try:
        importlib.import_module("megalite._C")
    except ModuleNotFoundError:
        return "megalite._C is not built"
    except ImportError as error:  # usually built for another version of torch
        return f"megalite._C fails to load ({error})"
    return None


_load_error = _load()


def compiled(op: str, device: str) -> bool:
    """Whether `op` ("causal_softmax", "rope") has a compiled kernel for `device` ("cpu", "cuda")."""
    if _load_error is not None or device not in _DISPATCH_KEYS:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"megalite::{op}", _DISPATCH_KEYS[device])


def available() -> dict[str, dict[str, list[str]]]:
    """The kernels of this installation: op -> device -> names, the one that `auto` prefers first.

    >>> available()  # a CPU build
    {'causal_softmax': {'cpu': ['fused', 'torch'], 'cuda': ['torch']}, 'rope': {...}}
    """
    return {op: {d: ["fused"] * compiled(op, d) + ["torch"] for d in _DISPATCH_KEYS} for op in _OPS}


def use_fused(op: str, kernel: str, x: torch.Tensor) -> bool:
    """Whether `op` on `x` runs the compiled kernel rather than the torch reference.

    `kernel`: "fused", "torch", or "auto": fused if it is compiled for x's device and supports x's dtype. The choice of
    "auto" is logged once per op, device and dtype. Raises ValueError if "fused" is not available.
    """
    return _use_fused(op, kernel, x.device.type, x.dtype)


@functools.cache
def _use_fused(op: str, kernel: str, device: str, dtype: torch.dtype) -> bool:
    if kernel not in ("auto", "fused", "torch"):
        raise ValueError(f'{op}: unknown kernel={kernel!r}; use "auto", "fused" or "torch"')
    if kernel == "torch":
        return False
    obstacle = None
    if not compiled(op, device):
        reason = _load_error or "megalite._C was built without it"
        obstacle = f"{op} has no compiled kernel for {device}: {reason}; build it with `{BUILD_COMMAND}`"
        if device == "cuda":
            obstacle += " with nvcc and a CUDA build of torch"
    elif dtype not in _DTYPES[device]:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES[device])
        obstacle = f"the compiled {op} on {device} supports {names}, not {str(dtype).removeprefix('torch.')}"
    if kernel == "fused" and obstacle:
        raise ValueError(f'kernel="fused": {obstacle}, or use kernel="torch"')
    _log.info("%s on %s, %s: %s", op, device, dtype, f"torch ({obstacle})" if obstacle else "fused")
    return obstacle is None


if _load_error is None:
    # output shapes for torch.compile and meta tensors
    @torch.library.register_fake("megalite::causal_softmax")
    def _(scores: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.empty_like(scores, memory_format=torch.contiguous_format)

    @torch.library.register_fake("megalite::causal_softmax_backward")
    def _(grad: torch.Tensor, probs: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.empty_like(probs, memory_format=torch.contiguous_format)

    @torch.library.register_fake("megalite::rope")
    def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
