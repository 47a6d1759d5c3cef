"""From the command line and YAML to a `Config`: a scalar is read as text and typed by the schema.

YAML's own guesses are switched off: `1e-3` is a number because the key is a float, `no` is refused for a bool,
`12:30:45` and `010` are not silently other numbers, and a key written twice is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import megalite
from megalite.config.habits import HABITS
from megalite.config.schema import SECTIONS, Config, hints_of
from megalite.config.show import key_help, type_name

PRESETS = Path(__file__).parent / "presets"
Nested = dict[str, dict[str, Any]]


class ConfigError(ValueError):
    """A mistake of the user's: one line with the value, the rule and a remedy."""


@dataclass(frozen=True)
class Request:
    """What the command line asked for. `explicit`: the keys that the user, not a preset, has set.

    `typed`: those of them that stand on the command line itself, not in the file that --config names, `file`.
    `preset`: the one named, else the default.
    """

    config: Config
    explicit: frozenset[str]
    preset: str | None
    print_config: bool
    dry_run: bool
    typed: frozenset[str] = frozenset()
    file: str | None = None
    preset_named: bool = False


class _TextLoader(yaml.SafeLoader):
    """YAML with no implicit types: a scalar is the text that was written."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as in the base class


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be plain text, not {key!r}")
        if key in result:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is written twice; keep one of them")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_TextLoader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def _read_yaml(text: str, where: str) -> Any:
    try:
        # a SafeLoader that knows fewer types still: it builds text, lists and mappings, and no object
        return yaml.load(text, _TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None


def _all_keys() -> list[str]:
    return [f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


def _nearest(key: str) -> str:
    keys = _all_keys()
    if habit := HABITS.get(key.rsplit(".", 1)[-1].replace("-", "_")):
        return f"; here it is {habit}"
    last = key.rsplit(".", 1)[-1]
    same_name = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        names = {k.rsplit(".", 1)[-1]: k for k in keys}
        close = [names[n] for n in difflib.get_close_matches(last, list(names), n=1, cutoff=0.6)]
    found = (same_name or close)[:1]
    return f"; did you mean {found[0]}?" if found else "; --help lists every key"


def _coerce(key: str, value: Any, hint: Any, choices: Sequence[str]) -> Any:
    """`value` (text, list or mapping, as YAML gave it) as the type of its key; ConfigError if it is not one."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None or (isinstance(value, str) and value in ("null", "~", "", "auto")):
            return None
        hint = next(a for a in typing.get_args(hint) if a is not types.NoneType)
    origin = typing.get_origin(hint)
    if origin is tuple:
        items = value if isinstance(value, list) else str(value).split(",") if value else []
        return tuple(_coerce(key, item, typing.get_args(hint)[0], ()) for item in items)
    if origin is not None:
        if value in (None, "", "null"):
            return {}
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise ConfigError(f"{key}={value!r}: expected {type_name(hint)}, e.g. {key}.en=data/en_text_document")
        return dict(value)
    if not isinstance(value, str):
        raise ConfigError(f"{key}={value!r}: expected {type_name(hint)}, not a list or mapping")
    if hint is str:
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, n=1, cutoff=0.4)
            raise ConfigError(
                f"{key}={value}: must be one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")
            )
        return value
    if hint is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ConfigError(f"{key}={value}: expected bool; write true or false")
    plain = value.replace("_", "")
    if hint is int:
        if re.fullmatch(r"[+-]?(0|[1-9]\d*)", plain):
            return int(plain)
        if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d+", plain) and float(plain).is_integer():
            return int(float(plain))
        octal = re.fullmatch(r"0\d+", plain)
        why = "a leading zero is octal to some readers; write it without" if octal else "write a whole number, e.g. 8"
        raise ConfigError(f"{key}={value}: expected int; {why}")
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", plain):
        return float(plain)
    raise ConfigError(f"{key}={value}: expected float; write a number, e.g. 3e-4")


def from_mapping(nested: Mapping[str, Any], where: str = "config") -> Config:
    """A `Config` from {section: {key: text}}; ConfigError for a wrong type or an unknown key, naming the nearest."""
    sections: dict[str, Any] = {}
    for section, values in nested.items():
        if section not in SECTIONS:
            raise ConfigError(f"{where}: unknown key {section}{_nearest(section)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: {section} is a section; write e.g. {_first_key(section)}=...")
        hints = hints_of(SECTIONS[section])
        metadata = {f.name: f.metadata for f in dataclasses.fields(SECTIONS[section])}
        kwargs = {}
        for name, value in values.items():
            key = f"{section}.{name}"
            if name not in hints:
                raise ConfigError(f"{where}: unknown key {key}{_nearest(key)}")
            if key == "train.steps" and _is_null(value):
                continue  # train.epochs may say how long the run is
            kwargs[name] = _coerce(key, value, hints[name], metadata[name]["choices"])
        sections[section] = SECTIONS[section](**kwargs)
    return Config(**sections)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in ("null", "~", ""))


def _first_key(section: str) -> str:
    return f"{section}.{dataclasses.fields(SECTIONS[section])[0].name}"


def _merge(base: Nested, extra: Mapping[str, Any]) -> None:
    for section, values in extra.items():
        if isinstance(values, Mapping) and isinstance(base.get(section, {}), dict):
            base.setdefault(section, {}).update(values)
        else:
            base[section] = values


def _override(nested: Nested, text: str) -> str:
    """Apply one `a.b=c` to `nested`; gives back the key."""
    key, equals, value = text.lstrip("-").partition("=")
    if not equals:
        raise ConfigError(f"{text}: not an override; write key=value, e.g. train.steps=20")
    parts = key.strip().split(".")
    if len(parts) < 2 or parts[0] not in SECTIONS:
        raise ConfigError(f"unknown key {key}{_nearest(key)}")
    parsed = _read_yaml(value, key) if value[:1] in ("[", "{", '"', "'") else value
    if len(parts) == 2:
        nested.setdefault(parts[0], {})[parts[1]] = parsed
    else:
        inner = nested.setdefault(parts[0], {}).setdefault(parts[1], {})
        if len(parts) > 3 or not isinstance(inner, dict) or parts[1] != "valid":
            raise ConfigError(f"unknown key {key}{_nearest(key)}")
        inner[parts[2]] = parsed
    return ".".join(parts[:2])


def read_yaml_file(path: Path) -> Any:
    """The nested text of a YAML file; ConfigError with the line where it is not valid."""
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text; is it really a YAML file?") from None
    nested = _read_yaml(text, str(path)) or {}
    if not isinstance(nested, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:' with keys below, found {type(nested).__name__}")
    return nested


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        flag = re.match(r"unrecognized arguments: --([\w-]+)", message)
        if flag:
            raise ConfigError(
                f"unknown flag --{flag[1]}{_nearest(flag[1].replace('-', '_'))}; keys are set as key=value"
            )
        raise ConfigError(f"{message}; --help shows the usage")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        print(f"megalite {megalite.__version__}")
        parser.exit(0)


def parse_command_line(argv: Sequence[str], *, default_preset: str | None, prog: str) -> Request:
    """Preset, then YAML file, then overrides, the later winning.

    Raises ConfigError for a mistake; `--help` and `--version` print and raise SystemExit(0).
    """
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--preset NAME] [--config FILE.yaml] [section.key=value ...]",
        description="Train a model. Under torchrun each process is one rank; without it there is one process.",
        epilog="keys, set in YAML or as section.key=value:" + key_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="NAME", help="one of: " + ", ".join(preset_names()))
    parser.add_argument("--config", metavar="FILE", help="YAML file with the sections below")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and end")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and plan, and end")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    # people used to other launchers write --train.steps=20 or --train.steps 20: both are taken
    args: list[str] = []
    words = iter(argv)
    for word in words:
        dotted = word.startswith("--") and word[2:].split("=")[0].split(".")[0] in SECTIONS
        args.append(word[2:] if dotted and "=" in word else f"{word[2:]}={next(words, '')}" if dotted else word)
    options = parser.parse_intermixed_args(args)

    preset = options.preset or (default_preset if options.config is None else None)
    nested: Nested = {}
    if preset is not None:
        if preset not in preset_names():
            near = difflib.get_close_matches(preset, preset_names(), n=1, cutoff=0.4)
            raise ConfigError(
                f"--preset {preset}: there is {', '.join(preset_names())}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        _merge(nested, read_yaml_file(PRESETS / f"{preset}.yaml"))
    explicit: set[str] = set()
    if options.config is not None:
        from_file = read_yaml_file(Path(options.config))
        from_mapping(from_file, options.config)
        _merge(nested, from_file)
        explicit |= {f"{section}.{key}" for section, values in from_file.items() for key in values}
    typed = {_override(nested, text) for text in options.overrides}
    train = nested.get("train", {})
    if _is_null(train.get("steps", 0)):
        if _is_null(train.get("epochs")):
            raise ConfigError("train.steps=null: expected int; write a whole number, e.g. 8")
        explicit, typed = explicit - {"train.steps"}, typed - {"train.steps"}
    config = from_mapping(nested, "command line")
    return Request(
        config,
        frozenset(explicit | typed),
        preset,
        options.print_config,
        options.dry_run,
        frozenset(typed),
        options.config,
        options.preset is not None,
    )
