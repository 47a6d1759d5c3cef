"""NVIDIA apex's fused AdamW, where the apex that is installed is NVIDIA's.

The package index has another apex, a web kit of 2013 that imports without complaint: what counts is the compiled part.
"""

from __future__ import annotations

import importlib
from typing import Any


def fused_adam() -> Any:
    """The class apex.optimizers.FusedAdam; ValueError with the remedy where it is not there or not NVIDIA's."""
    parts = {"amp_C": "multi_tensor_adam", "apex.optimizers": "FusedAdam"}
    for module, symbol in parts.items():
        try:
            found = getattr(importlib.import_module(module), symbol, None)
        except Exception as error:  # a half-built extension fails in many ways, each of which means: not here
            raise ValueError(_remedy(f"{module} cannot be imported ({error})")) from None
        if found is None:
            raise ValueError(_remedy(f"{module} has no {symbol}"))
    return found


def _remedy(why: str) -> str:
    return (
        f"optim.name=apex_adamw needs NVIDIA apex with its CUDA extensions, and {why}; use optim.name=adamw, which is "
        f"torch's fused one, or build apex from https://github.com/NVIDIA/apex (the package index's apex is another)"
    )
