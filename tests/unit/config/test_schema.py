"""Keys are an interface: old configurations must go on working, so no name, type or default changes unnoticed."""

import dataclasses
from pathlib import Path

from megalite.config.schema import SECTIONS, hints_of

FROZEN = Path(__file__).with_name("keys.txt")


def test_keys_are_the_frozen_ones():
    found = [
        f"{section}.{f.name}: {f.type} = {'{}' if f.default is dataclasses.MISSING else f.default!r}"
        for section, cls in SECTIONS.items()
        for f in dataclasses.fields(cls)
    ]
    # a change that is meant is made in keys.txt too, and told in the commit
    assert found == FROZEN.read_text(encoding="utf-8").splitlines()
    assert all(hints_of(cls) for cls in SECTIONS.values())
