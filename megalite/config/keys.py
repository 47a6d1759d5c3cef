"""How the keys of a configuration are defined, and how a resolved section narrows the type of some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from megalite.config.values import Range

MOST_LAYERS = 1000  # a plan stays fast; the deepest models known have 126 to 1000
POSITIONS = Range(1, 2**31 - 1, 8192)
SHARE = Range(0, 1, 0.1, below=True)
TURNS = Range(0, 10**6, 4, above=True)


def key(default: Any, help: str, range: Range | None = None, *, path: str = "", **names: Any) -> Any:
    """Define a key. `range`: of each number. `path`: "in" to read, "out" to write. `near`: the choice a text means."""
    metadata = {"help": help, "choices": (), "near": None, "range": range, "path": path, **names}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def rule_of(section: type, key: str) -> Mapping[str, Any]:
    """The metadata of a key, for the field that narrows its type: range, choices and help stay the same."""
    found: Mapping[str, Any] = section.__dataclass_fields__[key].metadata  # type: ignore[attr-defined]
    return found


def values_of(section: Any) -> dict[str, Any]:
    """The values of a section, or the sections of a configuration, by name."""
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}


class Complete:
    """Raises TypeError if a narrowed key is None: `dataclasses.replace(..., **values)` can hide that from mypy."""

    def __post_init__(self) -> None:
        for name in type(self).__annotations__:
            if getattr(self, name) is None:
                raise TypeError(f"{type(self).__name__}.{name} is None; call resolve")
