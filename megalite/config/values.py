"""Which values a key accepts: the range of a number, and rules for text and paths.

Each key has its rule in `config/schema.py`; `check_values` checks every value of a configuration against it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.errors import ConfigError

LONGEST = 4096  # bytes of a path on Linux, and enough for a list of patterns
# the kernel's file systems: a folder cannot be made there, or is lost
KERNEL = ("/proc", "/sys", "/dev")
# control characters, surrogates, and separators that some programs treat as line ends
CONTROL = ("Cc", "Cs", "Zl", "Zp")
# what other programs write for a value that is not set
NOTHING = ("", "null", "none", "~", "true", "false")


def shown(value: object, longest: int = 80) -> str:
    """`value` for a message: on one line, control characters escaped, cut at `longest` characters."""
    # nested YAML aliases can be huge: convert no more than is shown
    text = value if isinstance(value, str) else repr(value)[: 2 * longest] if _small(value) else f"a {_kind(value)}"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _kind(value: object) -> str:
    return {"dict": "mapping", "list": "list"}.get(type(value).__name__, type(value).__name__)


def _small(value: object, depth: int = 2) -> bool:
    """Whether `value` is nested so little that its repr is cheap."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 64 and all(_small(v, depth - 1) for v in value)
    return True


def number(value: float) -> str:
    """`value` as people write it: 1e-8 and 1e9, not 1e-08 and 1000000000."""
    if isinstance(value, int) and (abs(value) < 10**6 or value % 10**6):
        return str(value)
    return re.sub(r"e\+?(-?)0*(\d+)", r"e\1\2", f"{value:g}")


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; `above` excludes `least`, `below` excludes `most`, `zero` also allows 0."""

    least: float
    most: float
    example: float
    above: bool = False
    below: bool = False
    zero: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range."""
        if self.zero and value == 0:
            return True
        # NaN compares false, and so is outside
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        return (
            f"{'0, or ' if self.zero else ''}{'greater than' if self.above else 'at least'} {number(self.least)} "
            f"and {'less than' if self.below else 'at most'} {number(self.most)}"
        )

    @property
    def brief(self) -> str:
        """The range for --help: `1 to 1000`, `0, 1e-6 to 1e6`, `> 0 to 1`."""
        return (
            f"{'0, ' if self.zero else ''}{'> ' if self.above else ''}{number(self.least)} to "
            f"{'< ' if self.below else ''}{number(self.most)}"
        )


def check_values(config: Any) -> None:
    """Raise ConfigError for the first value of a `Config` that breaks the rule of its key."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for key in dataclasses.fields(values):
            _check(f"{section.name}.{key.name}", getattr(values, key.name), key.metadata)


def _check(key: str, value: Any, rule: Mapping[str, Any]) -> None:
    if isinstance(value, str):
        check_text(key, value, rule["path"])
    elif isinstance(value, Mapping):
        for name, text in value.items():
            check_text(f"{key} name", name, "")
            check_text(f"{key}.{shown(name)}", text, rule["path"])
    elif isinstance(value, tuple):
        if not value and rule["range"] is not None:
            raise ConfigError(f"{key}=[] is empty; use null, or e.g. {key}=[9, 8, 8, 7]")
        for item in value:
            _check(key, item, rule)
    elif value is not None and rule["range"] is not None and not rule["range"].holds(value):
        raise ConfigError(f"{key}={value} must be {rule['range']}, e.g. {number(rule['range'].example)}")


def check_text(key: str, text: str, path: str) -> None:
    """Raise ConfigError if `text` is not valid for `key`. `path`: "" for no path, "in" to read, "out" to write."""
    if path and text.strip().lower() in NOTHING:
        what = "a folder to write to" if path == "out" else "a file or folder"
        raise ConfigError(f"{key}={text} does not name anything; write {what}, e.g. {_example(key, path)}")
    if any(unicodedata.category(c) in CONTROL for c in text):
        raise ConfigError(f"{key}={shown(text)} contains control characters; write printable text on one line")
    if len(text.encode()) > LONGEST:
        raise ConfigError(f"{key}={shown(text)} is {len(text.encode())} bytes long; use at most {LONGEST}")
    if not path:
        return
    long = next((part for part in text.split("/") if len(part.encode()) > 255), None)
    if long is not None:
        raise ConfigError(f"{key}={shown(text)}: a name of {len(long.encode())} bytes; file names have at most 255")
    if text.startswith("~"):
        raise ConfigError(f"{key}={text}: the shell does not expand ~ after =; write e.g. {key}=$HOME/...")
    if path == "in" and re.fullmatch(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?", text) and re.search("[0-9]", text):
        raise ConfigError(f"{key}={text} is a number, expected a file or folder; for one with that name write ./{text}")
    if path == "out":
        if text != text.strip():
            raise ConfigError(f"{key}={text!r} begins or ends with a space; remove it")
        _check_folder(key, text)


def _example(key: str, path: str) -> str:
    return f"{key}={'runs/mine' if path == 'out' else 'data/text_document'}"


def _check_folder(key: str, text: str) -> None:
    """Raise ConfigError for the root folder and for the kernel's file systems."""
    real = os.path.realpath(text)
    if real == "/":
        raise ConfigError(f"{key}={text} is the root of the file system; write a folder, e.g. {_example(key, 'out')}")
    inside = next((k for k in KERNEL if real == k or real.startswith(k + "/")), None)
    if inside and not real.startswith("/dev/shm/"):
        raise ConfigError(
            f"{key}={text} is in {inside}, which is not a disk; write a folder, e.g. {_example(key, 'out')}"
        )
