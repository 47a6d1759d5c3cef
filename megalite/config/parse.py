"""Parses the command line and YAML into a `Request`: preset, then file, then overrides; later ones win."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megalite
from megalite.config.errors import ConfigError
from megalite.config.flags import Unknown, explain
from megalite.config.read import coerce, read_yaml, read_yaml_file
from megalite.config.request import Hardware, Request
from megalite.config.schema import SECTIONS, Config, hints_of
from megalite.config.show import key_help
from megalite.config.values import Range, check_values, shown

PRESETS = Path(__file__).parent / "presets"
Nested = dict[str, dict[str, Any]]
# whether a value follows
NO_VALUE = ("--print-config", "--dry-run", "--version", "--help", "-h")
OPTIONS = {"--preset": True, "--config": True} | dict.fromkeys(NO_VALUE, False)
HARDWARE = {"world": Range(1, 10**6, 64), "per_node": Range(1, 1024, 8), "gpu": Range(1, 1, 1)}


def from_mapping(nested: Mapping[str, Any], where: str = "config") -> Config:
    """Make a `Config` of {section: {key: text}}.

    Raises ConfigError for a wrong type, and for unknown keys, with their names in megalite. `check` checks ranges.
    """
    if unknown := list(_unknown_keys(nested)):
        raise explain(unknown, _flat(nested), where)
    sections: dict[str, Any] = {}
    for section, values in nested.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: {section} is a section; write e.g. {_first_key(section)}=...")
        hints = hints_of(SECTIONS[section])
        choices = {f.name: (f.metadata["choices"], f.metadata["near"]) for f in dataclasses.fields(SECTIONS[section])}
        # train.epochs may set the length instead
        given = {k: v for k, v in values.items() if (section, k) != ("train", "steps") or not _is_null(v)}
        sections[section] = SECTIONS[section](
            **{k: coerce(f"{section}.{k}", v, hints[k], *choices[k]) for k, v in given.items()}
        )
    return Config(**sections)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value in ("null", "~", ""))


def _unknown_keys(nested: Mapping[str, Any]) -> Iterator[Unknown]:
    """Yield the keys that the schema does not have, and every key of an unknown section."""
    for section, values in nested.items():
        if section in SECTIONS and isinstance(values, Mapping):
            names = hints_of(SECTIONS[section])
            yield from (Unknown(f"{section}.{k}", _words(v)) for k, v in values.items() if k not in names)
        elif section not in SECTIONS:
            yield from _leaves(section, values)


def _leaves(name: str, value: Any) -> Iterator[Unknown]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield Unknown(name, _words(value))


def _words(value: Any) -> tuple[str, ...]:
    """A value of a file as the words of a flag; none if no flag could have it."""
    words = value if isinstance(value, list) else [value]
    return tuple(shown(w, 200) for w in words[:20]) if all(isinstance(w, str) and w for w in words) else ()


def _flat(nested: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, values in nested.items() if isinstance(values, Mapping) for k, v in values.items()}


def _first_key(section: str) -> str:
    return f"{section}.{dataclasses.fields(SECTIONS[section])[0].name}"


def _merge(base: Nested, extra: Mapping[str, Any]) -> None:
    for section, values in extra.items():
        if isinstance(values, Mapping) and isinstance(base.get(section, {}), dict):
            base.setdefault(section, {}).update(values)
        else:
            base[section] = values


def _override(nested: Nested, text: str) -> str:
    """Apply one `a.b=c` to `nested`. Returns the key."""
    key, _, value = text.partition("=")
    parts = key.strip().split(".")
    parsed = read_yaml(value, shown(key)) if value[:1] in ("[", "{", '"', "'") else value
    section = nested.setdefault(parts[0], {})
    if len(parts) == 2:
        section[parts[1]] = parsed
    else:
        inner = section.get(parts[1]) or {}
        inner = inner if isinstance(inner, dict) else {}
        section[parts[1]] = {**inner, parts[2]: parsed}
    return ".".join(parts[:2])


def preset_names() -> list[str]:
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{shown(message, 200)}; --help shows the usage")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        print(f"megalite {megalite.__version__}")
        parser.exit(0)


def parse_command_line(argv: Sequence[str], *, default_preset: str | None, prog: str) -> Request:
    """Parse a command line: preset, then YAML file, then overrides; later ones win.

    `prog`: the name in --help. Raises ConfigError for a mistake, and SystemExit(0) after --help or --version.
    """
    words = _sorted_words(argv)
    options = _parser(prog).parse_args(words.options)
    preset = options.preset or (default_preset if options.config is None else None)
    nested: Nested = {}
    if preset is not None:
        if preset not in preset_names():
            near = difflib.get_close_matches(preset[:80], preset_names(), n=1, cutoff=0.4)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--preset {shown(preset)}: there is {', '.join(preset_names())}{meant}")
        _merge(nested, read_yaml_file(PRESETS / f"{preset}.yaml"))
    from_file = read_yaml_file(Path(options.config)) if options.config is not None else {}
    in_file = list(_unknown_keys(from_file))
    if in_file or words.unknown:
        known = nested if not in_file else {k: v for k, v in from_file.items() if k in SECTIONS and isinstance(v, dict)}
        where = options.config if in_file and not words.unknown else "command line" if in_file else ""
        for text in words.overrides:
            _override(known := {**known}, text)
        raise explain([*in_file, *words.unknown], _flat(known), where)
    from_mapping(from_file, options.config or "")
    _merge(nested, from_file)
    explicit = {f"{section}.{key}" for section, values in from_file.items() for key in values}
    typed = {_override(nested, text) for text in words.overrides}
    train = nested.get("train", {})
    if _is_null(train.get("steps", 0)):
        if _is_null(train.get("epochs")):
            raise ConfigError("train.steps=null: expected int; write a whole number, e.g. 8")
        explicit, typed = explicit - {"train.steps"}, typed - {"train.steps"}
    config = from_mapping(nested, "command line")
    check_values(config)
    hardware = _hardware(words.hardware)
    if hardware and not (options.dry_run or options.print_config):
        raise ConfigError(
            f"{' '.join(words.hardware)} is for --dry-run: a run uses the ranks that torchrun starts, on their GPUs"
        )
    return Request(
        config,
        frozenset(explicit | typed),
        preset,
        options.print_config,
        options.dry_run,
        frozenset(typed),
        options.config,
        options.preset is not None,
        hardware,
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--preset NAME] [--config FILE.yaml] [section.key=value ...]",
        description="Train a model. Under torchrun each process is one rank; without it there is one rank.",
        epilog="with --dry-run, to plan for other hardware:\n"
        "  world=N       number of ranks\n"
        "  gpu=NAME      name of the GPU, or its GiB: gpu=h100, gpu=a100-40, gpu=24\n"
        "  per_node=N    ranks per node, default 8\n\n"
        "keys, set in YAML or as section.key=value:" + key_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--preset", metavar="NAME", help="one of: " + ", ".join(preset_names()))
    parser.add_argument("--config", metavar="FILE", action=_Once, help="YAML file with the sections below")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and plan, and exit")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    return parser


class _Once(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        if getattr(namespace, self.dest) is not None:
            raise ConfigError(f"--{self.dest} is given twice; give one, and set keys as section.key=value")
        setattr(namespace, self.dest, value)


@dataclass
class _Words:
    """The words of a command line, by kind."""

    options: list[str]
    overrides: list[str]
    hardware: list[str]
    unknown: list[Unknown]


def _sorted_words(argv: Sequence[str]) -> _Words:
    """Sort words into options, `section.key=value` (also with dashes, or as two words), hardware, and unknown names."""
    found, words = _Words([], [], [], []), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        section = name.split(".")[0]
        if word.split("=")[0] in OPTIONS:
            found.options.append(word)
            if OPTIONS[word.split("=")[0]] and not equals and words:
                found.options.append(words.pop(0))
        elif name in HARDWARE and (equals or word.startswith("--")):
            found.hardware.append(f"{name}={value if equals else words.pop(0) if words else ''}")
        elif section in SECTIONS and "." in name and (equals or word.startswith("--")):
            text = f"{name}={value if equals else words.pop(0) if words else ''}"
            if _is_key(name):
                found.overrides.append(text)
            else:
                found.unknown.append(Unknown(name, (text.partition("=")[2],)))
        elif word.startswith("-") and name:
            values = [value] if equals else []
            while words and not equals and not _begins(words[0]):
                values.append(words.pop(0))
            found.unknown.append(Unknown(name, tuple(values), word[: len(word) - len(word.lstrip("-"))]))
        elif equals and name:
            found.unknown.append(Unknown(name, (value,)))
        elif word not in ("--", ""):
            raise ConfigError(f"{shown(word)}: not an override; write key=value, e.g. train.steps=20")
    return found


def _is_key(name: str) -> bool:
    section, _, rest = name.partition(".")
    key, _, inner = rest.partition(".")
    known = key in hints_of(SECTIONS[section])
    return known and (not inner or (name.startswith("data.valid.") and "." not in inner))


def _begins(word: str) -> bool:
    """Whether `word` starts an option or override, rather than being a value of the flag before it."""
    name = word.split("=")[0]
    override = "=" in word and (name.split(".")[0] in SECTIONS or name in HARDWARE)
    return override or bool(re.match(r"--?[A-Za-z]", word))


def _hardware(words: Sequence[str]) -> Hardware | None:
    values = dict(word.split("=", 1) for word in words)
    if len(values) < len(words):
        raise ConfigError(f"{' '.join(words)}: one of them is given twice; keep one")
    if not values:
        return None
    counts = {name: coerce(name, values[name], int, ()) for name in ("world", "per_node") if name in values}
    for name, count in counts.items():
        if not HARDWARE[name].holds(count):
            raise ConfigError(f"{name}={count} must be {HARDWARE[name]}, e.g. {HARDWARE[name].example}")
    return Hardware(counts.get("world"), values.get("gpu"), counts.get("per_node"))
