"""JSON files of transformers and peft, each key checked for type and range when it is read. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.config.values import shown

LARGEST = 2**31 - 1
_SHOWN = 80  # characters of a value in a message
_NO_DEFAULT = object()
_PLAIN = (bool, int, float, str, list, dict)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, if it holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a folder that holds it, or download the file again") from None
    except RecursionError:
        raise ValueError(f"{path}: not usable JSON (nested too deeply); download the file again") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON ({error}); download the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, not an object of keys; download the file again")
    return found


def as_json(value: object) -> str:
    """A value for a message: JSON, in one line, at most 80 characters."""
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, ValueError, TypeError):
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class Fields:
    """The keys of one JSON object. Every ValueError names file, key and value.

    An absent key has the value `default`, a null one the value `null`; without them, it is an error. transformers and
    peft treat absent and null differently.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def refuse(self, key: str, why: str, value: Any = _NO_DEFAULT) -> ValueError:
        """The ValueError to raise for a key: file, key, value, and `why`."""
        value = self.values.get(key) if value is _NO_DEFAULT else value
        return ValueError(f"{self.where}: {shown(key)}={as_json(value)} {why}")

    def _value(self, key: str, kinds: tuple[type, ...], default: Any, null: Any) -> Any:
        value = self.values.get(key, _NO_DEFAULT)
        if value is _NO_DEFAULT:
            if default is _NO_DEFAULT:
                raise ValueError(f"{self.where}: {key} is missing; add it")
            return default
        if value is None and null is not _NO_DEFAULT:
            return null
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.refuse(key, f"is not of type {kinds[0].__name__}")
        return value

    def whole(
        self, key: str, default: Any = _NO_DEFAULT, null: Any = _NO_DEFAULT, low: int = 1, high: int = LARGEST
    ) -> int:
        """An integer from `low` to `high`; `default` and `null` may be anything."""
        value: int = self._value(key, (int,), default, null)
        if value is default and key not in self.values:
            return value
        if not low <= value <= high:
            raise self.refuse(key, f"must be from {low} to {high}", value)
        return value

    def number(
        self,
        key: str,
        default: Any = _NO_DEFAULT,
        null: Any = _NO_DEFAULT,
        *,
        above: float = -math.inf,
        low: float = -math.inf,
        below: float = math.inf,
    ) -> float:
        """A finite number x with `above` < x, `low` <= x and x < `below`."""
        given = self._value(key, (float, int), default, null)
        try:
            value = float(given)
        except OverflowError:
            value = math.inf
        if not (math.isfinite(value) and above < value < below and low <= value):
            rules = [f"{word} {bound:g}" for word, bound in (("above", above), ("at least", low), ("below", below))
                     if math.isfinite(bound)]  # fmt: skip
            raise self.refuse(key, " and ".join(["must be a finite number", *rules]), given)
        return value

    def flag(self, key: str, default: Any = _NO_DEFAULT) -> bool:
        """true or false."""
        value: bool = self._value(key, (bool,), default, _NO_DEFAULT)
        return value

    def word(self, key: str, default: Any = _NO_DEFAULT) -> str:
        """A string."""
        value: str = self._value(key, (str,), default, _NO_DEFAULT)
        return value

    def choice(self, key: str, choices: Mapping[str, str], default: str) -> str:
        """What `choices` has for the key's value."""
        value = self.word(key, default)
        if value not in choices:
            raise self.refuse(key, f"is not supported; use one of {', '.join(choices)}", value)
        return choices[value]

    def neutral(self, table: Mapping[str, tuple[Any, ...]], why: str) -> None:
        """Raise ValueError for a key of `table` whose value is neither null nor one of those in the table."""
        for key, allowed in table.items():
            value = self.values.get(key)
            if value is not None and not (isinstance(value, _PLAIN) and value in allowed):
                raise self.refuse(key, why)
