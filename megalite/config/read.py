"""YAML as text, and text as the type of its key.

YAML's own guesses are off: `1e-3` is a number because the key is a float, `no` is refused for a bool, `12:30:45` and
`010` do not silently become other numbers, and a key written twice is an error.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megalite.config.errors import ConfigError
from megalite.config.show import type_name
from megalite.config.values import shown

MOST_BYTES = 2**20  # of a configuration file; the longest of people's are a hundredth of it
MOST_DIGITS = 40


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        where = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise ConfigError(f"{where}: a key must be plain text, not {shown(key)}")
        if key in result:
            raise ConfigError(f"{where}: key {shown(key)!r} is written twice; keep one of them")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


class _TextLoader(yaml.SafeLoader):
    """YAML of text, lists and mappings only: a scalar is its text as written, a tag is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        "tag:yaml.org,2002:str": yaml.SafeLoader.construct_yaml_str,
        "tag:yaml.org,2002:seq": yaml.SafeLoader.construct_yaml_seq,
        "tag:yaml.org,2002:map": _no_duplicates,
        None: yaml.SafeLoader.construct_undefined,
    }


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML into nested text. Raises ConfigError, with the line, if it is not valid."""
    try:
        # a SafeLoader with fewer types: it makes text, lists and mappings only
        return yaml.load(text, _TextLoader)
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where} line {number}: not valid YAML: control character U+{int(error.character):04X}"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
        raise ConfigError(f"{where}{line}: not valid YAML: {shown(str(problem), 200)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply; sections with keys below are two levels") from None
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None


def read_yaml_file(path: Path) -> Any:
    """Read a YAML file into nested text. Raises ConfigError, with the line, if it is not valid."""
    if not path.is_file():
        raise ConfigError(f"--config {path}: {'is a folder' if path.is_dir() else 'no such file'}; name a YAML file")
    if path.stat().st_size > MOST_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes, more than {MOST_BYTES}; is it really a YAML file?")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; is it really a YAML file?") from None
    nested = read_yaml(text, str(path)) or {}
    if not isinstance(nested, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' with keys below, found {type(nested).__name__}")
    # an empty section has all its keys commented out
    return {section: {} if values == "" else values for section, values in nested.items()}


def coerce(
    key: str, value: Any, hint: Any, choices: Sequence[str] = (), nearest: Callable[[str], str | None] | None = None
) -> Any:
    """Convert `value`, text or a list or mapping of text, to the type of its key. Raises ConfigError if it cannot be.

    `nearest`: a function that returns the choice an unknown text may mean, or None; default: by similar spelling.
    """
    if typing.get_origin(hint) is types.UnionType:
        if value is None or (isinstance(value, str) and value in ("null", "~", "", "auto")):
            return None
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | str):
        items = value if isinstance(value, list) else value.split(",") if value else []
        return tuple(coerce(key, item, typing.get_args(hint)[0], ()) for item in items)
    if origin is not None and origin is not tuple:
        if value in (None, "", "null", "~"):
            return {}
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ConfigError(
                f"{key}={shown(value)!r}: expected {type_name(hint)}, e.g. {key}.en=data/en_text_document"
            )
        return dict(value)
    if not isinstance(value, str):
        raise ConfigError(f"{key}={shown(value)}: expected {type_name(hint)}, not a list or mapping")
    if hint is str:
        if choices and value not in choices:
            near = nearest(value[:80]) if nearest else _nearest_choice(value[:80], choices)
            raise ConfigError(
                f"{key}={shown(value)}: must be one of {', '.join(choices)}"
                + (f"; did you mean {near}?" if near else "")
            )
        return value
    if hint is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ConfigError(f"{key}={shown(value)}: expected bool; write true or false")
    return _int(key, value) if hint is int else _float(key, value)


def _nearest_choice(value: str, choices: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(value, choices, n=1, cutoff=0.4)), None)


def _plain(value: str) -> str:
    """`value` without underscores between digits."""
    return re.sub(r"(?<=[0-9])_(?=[0-9])", "", value)


def _int(key: str, value: str) -> int:
    plain = _plain(value)
    if len(plain) <= MOST_DIGITS:
        if re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", plain):
            return int(plain)
        # not through a float, which has 15 digits
        if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?[eE]\+?[0-9]+", plain) and Decimal(plain).adjusted() < MOST_DIGITS:
            exact = Decimal(plain)
            if exact == exact.to_integral_value():
                return int(exact)
    elif re.fullmatch(r"[+-]?[0-9]+", plain):
        raise ConfigError(f"{key}={shown(value, 30)}: a number of {len(plain)} digits; write at most {MOST_DIGITS}")
    octal = re.fullmatch(r"0[0-9]+", plain)
    why = (
        "a leading zero means octal to some YAML parsers; write it without" if octal else "write a whole number, e.g. 8"
    )
    raise ConfigError(f"{key}={shown(value)}: expected int; {why}")


def _float(key: str, value: str) -> float:
    plain = _plain(value)
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", plain):
        raise ConfigError(f"{key}={shown(value)}: expected float; write a number, e.g. 3e-4")
    if float(plain) == 0 and re.search("[1-9]", plain.lower().split("e")[0]):
        raise ConfigError(f"{key}={shown(value)} is too small for a float; write 0 or a larger number")
    return float(plain)
