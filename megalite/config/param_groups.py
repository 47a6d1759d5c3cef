"""Parameter groups: learning rate and weight decay by parameter name.

`optim.groups` is text: "PATTERN SETTING=NUMBER ...; PATTERN ...". Settings are lr_scale and weight_decay; patterns use
* and ? as in file names, and the first that matches a name wins.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate

from megalite.config.errors import ConfigError
from megalite.config.schema import OptimConfig
from megalite.config.values import Range, shown

SETTINGS = {"lr_scale": Range(1e-6, 1000, 0.1, zero=True), "weight_decay": Range(1e-9, 10, 0.1, zero=True)}


@dataclass(frozen=True)
class Group:
    """`lr_scale` multiplies the learning rate; `weight_decay` None: optim.weight_decay for matrices, else 0."""

    pattern: str
    lr_scale: float = 1.0
    weight_decay: float | None = None


def parse_groups(text: str) -> list[Group]:
    """Parse `optim.groups`. Raises ConfigError if it is not valid."""
    found = []
    for part in filter(str.strip, text.split(";")):
        pattern, *words = part.split()
        values = {}
        for word in words:
            name, _, number = word.partition("=")
            if name in values:
                raise ConfigError(f"optim.groups: {name} of pattern {shown(pattern)} is set twice; keep one")
            try:
                values[name] = float(number)
            except ValueError:
                values[name] = float("nan")
            if name not in SETTINGS or math.isnan(values[name]):
                raise ConfigError(
                    f"optim.groups: {shown(word)!r} of pattern {shown(pattern)!r} is not a setting; "
                    f'write e.g. "embed.* lr_scale=0.1 weight_decay=0; layers.0.* lr_scale=0.5"'
                )
            if not SETTINGS[name].holds(values[name]):
                raise ConfigError(f"optim.groups: {shown(word)} of pattern {shown(pattern)} must be {SETTINGS[name]}")
        if not values:
            raise ConfigError(f"optim.groups: pattern {pattern!r} sets nothing; add {' or '.join(SETTINGS)}=NUMBER")
        found.append(Group(pattern, **values))
    return found


def check_groups(c: OptimConfig, names: Collection[str]) -> None:
    """Raise ConfigError if a pattern matches none of `names`, the parameters of the whole model."""
    for group in parse_groups(c.groups):
        if not any(map(re.compile(translate(group.pattern)).match, names)):
            near = difflib.get_close_matches(shown(group.pattern), list(names)[:2000], n=1, cutoff=0.0)
            raise ConfigError(f"optim.groups: no parameter is named {shown(group.pattern)}; did you mean {near[0]}?")


def group_settings(c: OptimConfig, name: str, matrix: bool) -> tuple[float, float]:
    """(factor of the learning rate, weight decay) of the parameter `name`."""
    usual = c.weight_decay if matrix else 0.0
    fits = (group for group in parse_groups(c.groups) if fnmatchcase(name, group.pattern))
    group = next(fits, Group(name))
    return group.lr_scale, usual if group.weight_decay is None else group.weight_decay
