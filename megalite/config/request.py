"""What a command line asks for: a configuration, and which of its keys the user has set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.schema import Config


@dataclass(frozen=True)
class Hardware:
    """The hardware to plan for; None: that of this machine. `per_node`: ranks on each node."""

    world: int | None = None
    gpu: str | None = None
    per_node: int | None = None


@dataclass(frozen=True)
class Request:
    """A configuration as asked for. `explicit`: the keys that the user has set, not a preset.

    `typed`: those of `explicit` that are on the command line itself, not in `file`, the file of --config.
    `preset`: the name given with --preset (then `preset_named`), or the default.
    """

    config: Config
    explicit: frozenset[str]
    preset: str | None
    print_config: bool
    dry_run: bool
    typed: frozenset[str] = frozenset()
    file: str | None = None
    preset_named: bool = False
    hardware: Hardware | None = None

    def replaced(self, **sections: Mapping[str, Any]) -> Request:
        """This request with other values: section={key: value}."""
        config = self.config
        new = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, config=dataclasses.replace(config, **new))

    def forgetting(self, *keys: str) -> Request:
        """This request as if the user had not set `keys`; their values stay."""
        return dataclasses.replace(self, explicit=self.explicit - set(keys))
