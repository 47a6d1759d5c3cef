"""How keys are defined, and how a resolved section narrows some of them."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from megalite.config.keys import Complete, key, rule_of, values_of
from megalite.config.values import Range


@dataclass(frozen=True)
class Section:
    size: int | None = key(None, "how large", Range(1, 9, 3))
    names: dict[str, str] = key({"a": "b"}, "paths by name", path="in")  # noqa: RUF009


@dataclass(frozen=True)
class Narrow(Complete, Section):
    size: int = field(kw_only=True, metadata=rule_of(Section, "size"))


def test_a_key_has_its_default_and_its_rule() -> None:
    size, names = dataclasses.fields(Section)
    assert (size.default, size.metadata["range"], size.metadata["help"]) == (None, Range(1, 9, 3), "how large")
    assert (names.metadata["path"], names.metadata["range"]) == ("in", None)
    assert Section().names == {"a": "b"}
    assert Section().names is not Section().names


def test_a_narrowed_key_keeps_its_place_and_its_rule() -> None:
    assert [f.name for f in dataclasses.fields(Narrow)] == ["size", "names"]
    assert dataclasses.fields(Narrow)[0].metadata == dataclasses.fields(Section)[0].metadata
    assert values_of(Narrow(size=3)) == {"size": 3, "names": {"a": "b"}}


def test_a_narrowed_key_has_a_value() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'size'"):
        Narrow()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^Narrow.size is None; call resolve$"):
        Narrow(**values_of(Section()))
