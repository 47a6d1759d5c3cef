"""NVIDIA apex's fused AdamW, recognised by its compiled part.

The apex in the package index is an unrelated web toolkit from 2013, which also imports without errors.
"""

from __future__ import annotations

import importlib
from typing import Any


def fused_adam() -> Any:
    """Return the class apex.optimizers.FusedAdam. Raises ValueError if NVIDIA's apex is not installed."""
    parts = {"amp_C": "multi_tensor_adam", "apex.optimizers": "FusedAdam"}
    for module, symbol in parts.items():
        try:
            found = getattr(importlib.import_module(module), symbol, None)
        except Exception as error:  # a half-built extension can raise anything
            raise ValueError(_remedy(f"{module} cannot be imported ({error})")) from None
        if found is None:
            raise ValueError(_remedy(f"{module} has no {symbol}"))
    return found


def _remedy(why: str) -> str:
    return (
        f"optim.name=apex_adamw needs NVIDIA apex with its CUDA extensions, but {why}; use optim.name=adamw, which is "
        f"torch's fused AdamW, or build apex from https://github.com/NVIDIA/apex (apex from the package index is an "
        f"unrelated package)"
    )
