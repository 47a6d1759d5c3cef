"""How keys are defined, and how a resolved section narrows some of them."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from megalite.config import Config, ModelConfig, resolve
from megalite.config.keys import Complete, key, rule_of, values_of
from megalite.config.schema import SECTIONS
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


def test_choices_and_the_choice_a_text_means() -> None:
    rule = key("a", "the kind", choices=("a", "b"), near=str.lower).metadata
    assert rule["choices"] == ("a", "b")
    assert rule["near"]("B") == "b"
    assert rule_of(Section, "size") == {
        "help": "how large",
        "choices": (),
        "near": None,
        "range": Range(1, 9, 3),
        "path": "",
    }


def test_values_of_a_section_and_of_a_configuration() -> None:
    config = resolve(Config(), 1)
    assert values_of(config)["model"] is config.model
    plain = ModelConfig(**values_of(config.model))
    assert plain != config.model  # another class
    assert values_of(plain) == values_of(config.model)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_the_schema_is_defined_by_key(name: str) -> None:
    """With help on one line, and a range for every number: what a user sees comes from here."""
    for each in dataclasses.fields(SECTIONS[name]):
        rule = rule_of(SECTIONS[name], each.name)
        assert rule.keys() >= {"help", "choices", "near", "range", "path"}
        assert rule["help"]
        assert "\n" not in rule["help"]
        assert rule["path"] in ("", "in", "out")
        if isinstance(each.default, int | float) and not isinstance(each.default, bool):
            assert rule["range"] is not None
