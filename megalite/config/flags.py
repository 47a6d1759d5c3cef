"""Advice for names that are not keys: the key in megalite, with its value, or why it is not supported.

The table is `flags.yaml`: flags of other engines that their users type first.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megalite.config.errors import ConfigError
from megalite.config.read import read_yaml_file
from megalite.config.schema import SECTIONS, hints_of
from megalite.config.values import number, shown

TABLE = Path(__file__).parent / "flags.yaml"
ON, OFF = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none")
HERE = "here it is "
# similarity of a misspelt name; a bad guess is worse than none
NEAR = 0.75


@dataclass(frozen=True)
class Unknown:
    """A name that is not a key. `values`: the words after it; `dashes`: the dashes before it."""

    name: str
    values: tuple[str, ...] = ()
    dashes: str = ""

    def __str__(self) -> str:
        return self.dashes + shown(self.name)


def explain(unknown: Sequence[Unknown], known: Mapping[str, Any], where: str = "") -> ConfigError:
    """One error for all unknown names. `known`: values of keys as text, from which others are computed."""
    values = {key: value for key, value in known.items() if isinstance(value, str)}
    # one flag may need another: a ratio needs the steps, the steps the batch
    for _ in range(3):
        for each in unknown:
            advice = _advice(each, values) or ""
            values |= dict(re.findall(r"([a-z]+\.\w+)=(\S+)", advice) if advice.startswith(HERE) else ())
            if open_ := re.match(rf"{HERE}([a-z]+\.\w+), as ", advice):
                values.pop(open_[1], None)
            if "train.epochs" in values:
                values.pop("train.steps", None)
    advised = [(each, _advice(each, values) or _near(each)) for each in unknown]
    start = f"{where}: " if where else ""
    if len(advised) == 1:
        (each, advice), form = advised[0], "; keys are set as key=value" if advised[0][0].dashes else ""
        return ConfigError(f"{start}unknown {'flag' if each.dashes else 'key'} {each}; {advice}{form}")
    each_one = "; ".join(f"{each}: {advice.removeprefix(HERE)}" for each, advice in advised)
    return ConfigError(f"{start}{len(advised)} unknown flags or keys; keys are set as key=value: {each_one}")


@cache
def _table() -> dict[str, list[tuple[str, str]]]:
    """The rows of the table by name: (kind, text)."""
    found: dict[str, list[tuple[str, str]]] = {}
    for kind, rows in read_yaml_file(TABLE).items():
        for text, names in rows.items():
            if kind == "value":
                text, names = names, text
            for name in names.split():
                found.setdefault(name, []).append((kind, text))
    return found


@cache
def _keys() -> dict[str, list[str]]:
    """Keys by their last name."""
    found: dict[str, list[str]] = {}
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            found.setdefault(field.name, []).append(f"{section}.{field.name}")
    return found


def _advice(each: Unknown, known: Mapping[str, str]) -> str | None:
    """What to write instead of a name that the table or the schema has, else None."""
    plain = each.name.replace("-", "_").lower()
    last = plain.rsplit(".", 1)[-1]
    for name, values in ((plain, each.values), (last, each.values), *_negated(last, each.values)):
        if name in SPECIAL:
            return SPECIAL[name](values)
        if rows := _table().get(name):
            return _of_table(rows, values, known)
        if keys := _keys().get(name):
            if len(keys) == 1:
                return f"{HERE}{_setting(keys[0], values)}"
            return f"{HERE}{' or '.join(keys)}"
    starts = [name for name in _table() if name.endswith("*") and last.startswith(name[:-1])]
    return _of_table(_table()[max(starts, key=len)], each.values, known) if starts else None


def _negated(name: str, values: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    for prefix in ("no_", "disable_"):
        if name.startswith(prefix):
            return [(name.removeprefix(prefix), ("false",))]
    for prefix in ("enable_", "use_"):
        if name.startswith(prefix):
            return [(name.removeprefix(prefix), values or ("true",))]
    return []


def _setting(key: str, values: Sequence[str]) -> str:
    """`key=value`, or `key=...` if the value is not known."""
    section, name = key.split(".")
    hint = hints_of(SECTIONS[section]).get(name)
    if not values:
        return f"{key}=true" if hint is bool else f"{key}=..."
    if hint is bool:
        low = values[0].lower()
        return f"{key}={'true' if low in ON else 'false' if low in OFF else shown(low)}"
    text = ",".join(values) if key in ("parallel.stages",) else " ".join(values)
    if key in ("tune.lora_targets", "tune.freeze"):
        text = re.sub(r"[\s,\[\]'\"]+", " ", text).strip()
        text = {"all": "", "all-linear": "", "all_linear": ""}.get(text, text)
    elif len(values) > 1 and key != "parallel.stages":
        return f"{key}=..., which takes one value, not {len(values)}"
    return f"{key}={shown(text)}" if " " not in text else f'{key}="{shown(text)}"'


def _of_table(rows: Sequence[tuple[str, str]], values: tuple[str, ...], known: Mapping[str, str]) -> str:
    if values[:1] in (("null",), ("~",)):
        return "leave it out: nothing is set"
    kinds = dict(rows)
    value = values[0].lower() if values else "true"
    if "switch" in kinds and (value in (*ON, *OFF) or "same" not in kinds):
        on, off = kinds["switch"].split("|")
        if value in OFF:
            return f"{HERE}{off}" if off else "leave it out: it is off unless it is set"
        return f"{HERE}{on}" if value in ON or not off else f"{HERE}{on}, or {off}"
    if "same" in kinds:
        return f"{HERE}{_setting(kinds['same'], values)}"
    (kind, text) = rows[0]
    if kind == "value":
        key, *pairs = text.split()
        names = dict(pair.split("=") for pair in pairs)
        if value in names:
            return f"{HERE}{key}={names[value]}"
        return f"{HERE}{key}={' or '.join(dict.fromkeys(names.values()))}; {shown(value)} is not supported"
    if kind == "product":
        return f"{HERE}{_product(text, values, known)}"
    if kind == "unneeded":
        return f"leave it out: {text}"
    return text if "not supported" in text else f"not supported: {text}"


def _product(rule: str, values: tuple[str, ...], known: Mapping[str, str]) -> str:
    """Evaluate a rule such as `KEY = * a / b` as far as its factors are known."""
    key, _, factors = rule.partition(" = ")
    words = factors.split()
    section, name = key.split(".")
    signs, names = words[::2], words[1::2]
    numbers = [_number(known.get(n, n)) for n in names]
    start = _number(values[0]) if values else None
    if start is not None and None not in numbers and 0.0 not in numbers:
        for sign, factor in zip(signs, numbers):
            assert factor is not None
            start = start * factor if sign == "*" else start / factor
        return f"{key}={round(start) if hints_of(SECTIONS[section])[name] is not float else number(float(start))}"
    shown_numbers = [known.get(n) or n for n in names]
    symbols = {"*": "x", "/": "/"}
    formula = " ".join(
        [shown(values[0]) if values else "N", *(f"{symbols[s]} {n}" for s, n in zip(signs, shown_numbers))]
    )
    return f"{key}, as {formula}"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    # larger numbers are nonsense, and a float cannot be rounded there
    return number if abs(number) < 1e18 else None


def _near(each: Unknown) -> str:
    """The nearest key or flag to an unknown name, if one is near."""
    plain = shown(each.name.replace("-", "_").lower())
    last, keys = plain.rsplit(".", 1)[-1], _keys()
    section = ".".join(plain.split(".")[:2])
    if plain in SECTIONS:
        return f"it is a section; write e.g. {plain}.{dataclasses.fields(SECTIONS[plain])[0].name}=..."
    found = [section] if any(section in group for group in keys.values()) else []
    near = difflib.get_close_matches(last, list(keys), n=1, cutoff=NEAR)
    begun = [name for name in keys if len(last) > 3 and name.startswith(f"{last}_")]
    for name in near or begun[:1]:
        # of keys with the same name, the one in the section that was written
        found += sorted(keys[name], key=lambda key: not plain.startswith(key.split(".")[0]))
    if found:
        return f"did you mean {found[0]}?"
    other = difflib.get_close_matches(last, list(_table()), n=1, cutoff=0.85)
    if (
        other
        and abs(len(other[0]) - len(last)) <= 3
        and (advice := _advice(dataclasses.replace(each, name=other[0]), {}))
    ):
        return f"did you mean {other[0]}? {advice}"
    return "--help lists every key"


def _split(values: tuple[str, ...]) -> str:
    shares = [_number(word) for word in re.split(r"[,\s]+", " ".join(values)) if word]
    if len(shares) < 2 or None in shares or not sum(s or 0 for s in shares):
        return "here it is data.valid_fraction, the share that is held out, e.g. 0.02"
    numbers = [s or 0.0 for s in shares]
    return f"here it is data.valid_fraction={number(round(sum(numbers[1:]) / sum(numbers), 6))}, held out from the end"


def _val_size(values: tuple[str, ...]) -> str:
    share = _number(values[0]) if values else None
    if share is not None and share >= 1:
        return f"here it is data.valid_fraction, a share of the rows: {shown(values[0])} / rows"
    return f"{HERE}{_setting('data.valid_fraction', values[:1])}"


def _ramp(values: tuple[str, ...]) -> str:
    if len(values) == 3:
        return (
            f"here it is train.ramp_start={shown(values[0])} train.ramp_samples={shown(values[2])}; "
            f"it grows by micro_batch_size x dp"
        )
    return "here it is train.ramp_start=N train.ramp_samples=N"


def _data_path(values: tuple[str, ...]) -> str:
    if len(values) > 1:
        return (
            "here it is data.path=PREFIX, one set: blends are not supported; join the texts before "
            "tools/preprocess_data.py"
        )
    return f"{HERE}{_setting('data.path', values)}"


SPECIAL = {
    "split": _split,
    "val_size": _val_size,
    "val_set_size": _val_size,
    "validation_split_percentage": lambda values: _val_size(
        (number(float(values[0]) / 100),) if values and _number(values[0]) is not None else ()
    ),
    "rampup_batch_size": _ramp,
    "data_path": _data_path,
    "train_data_path": _data_path,
}
