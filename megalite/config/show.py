"""A configuration as YAML that reads back, and the help of every key."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any

import yaml

from megalite.config.schema import SECTIONS, Config, hints_of


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is types.UnionType:
        return " or null".join(type_name(a) for a in typing.get_args(hint) if a is not types.NoneType) + " or null"
    origin = typing.get_origin(hint)
    if origin is tuple:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if origin is not None:
        return "NAME: PREFIX pairs"
    return {"int": "int", "float": "float", "bool": "bool", "str": "text"}[hint.__name__]


def key_help() -> str:
    """The help of every key: type, range, default and one line."""
    lines = []
    for section, cls in SECTIONS.items():
        hints = hints_of(cls)
        lines.append(f"\n{section}:")
        for f in dataclasses.fields(cls):
            default = f.default if f.default is not dataclasses.MISSING else "{}"
            kind = "|".join(f.metadata["choices"]) or type_name(hints[f.name])
            kind += f" {f.metadata['range'].brief}" if f.metadata["range"] else ""
            lines.append(f"  {section}.{f.name}  ({kind}, default {_scalar(default)})\n      {f.metadata['help']}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_quoted(v) if isinstance(v, str) else str(v) for v in value) + "]"
    return str(value)


def to_yaml(config: Config) -> str:
    """`config` as YAML; parsing it gives an equal `Config`."""
    lines = []
    for section in SECTIONS:
        lines.append(f"{section}:")
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            if isinstance(value, dict):
                lines.append(f"  {name}:" + (" {}" if not value else ""))
                lines += [f"    {_quoted(k)}: {_quoted(v)}" for k, v in value.items()]
            else:
                lines.append(f"  {name}: {_quoted(value) if isinstance(value, str) else _scalar(value)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", text):
        return text
    return yaml.dump(text, allow_unicode=True, default_style='"', width=10**6).strip()
