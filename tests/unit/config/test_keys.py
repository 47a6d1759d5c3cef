"""How a key is defined, how a resolved section narrows it, and what every key of the schema has."""

import dataclasses
from dataclasses import dataclass

import pytest

from megalite.config import Config, ModelConfig, resolve
from megalite.config.keys import Complete, key, rule_of, values_of
from megalite.config.schema import SECTIONS
from megalite.config.values import Range


@dataclass(frozen=True)
class Section:
    size: int | None = key(None, "the size", Range(1, 8, 4))
    kind: str = key("a", "the kind", choices=("a", "b"), near=str.lower)
    files: dict[str, str] = key({"x": "y"}, "files to read", path="in")  # noqa: RUF009


@dataclass(frozen=True)
class Narrowed(Complete, Section):
    size: int = dataclasses.field(default=1, metadata=rule_of(Section, "size"))


def test_a_key_has_its_rule() -> None:
    assert Section() == Section(None, "a", {"x": "y"})
    assert rule_of(Section, "size") == {
        "help": "the size",
        "choices": (),
        "near": None,
        "range": Range(1, 8, 4),
        "path": "",
    }
    assert rule_of(Section, "kind")["choices"] == ("a", "b")
    assert rule_of(Section, "kind")["near"]("B") == "b"
    assert rule_of(Section, "files")["path"] == "in"


def test_a_default_that_can_be_changed_is_a_sections_own() -> None:
    first = Section()
    first.files["x"] = "z"
    assert Section().files == {"x": "y"}


def test_values_of_a_section_and_of_a_configuration() -> None:
    assert values_of(Section(3)) == {"size": 3, "kind": "a", "files": {"x": "y"}}
    config = resolve(Config(), 1)
    assert values_of(config)["model"] is config.model
    assert ModelConfig(**values_of(config.model)) != config.model  # another class
    assert values_of(ModelConfig(**values_of(config.model))) == values_of(config.model)


def test_a_narrowed_key_keeps_its_rule_and_is_never_none() -> None:
    assert rule_of(Narrowed, "size") == rule_of(Section, "size")
    assert Narrowed(5).size == 5
    with pytest.raises(TypeError, match=r"^Narrowed\.size is None; call resolve$"):
        Narrowed(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Narrowed\.size is None; call resolve$"):
        dataclasses.replace(Narrowed(5), **{"size": None})


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_the_schema_is_defined_by_key(name: str) -> None:
    """With help on one line, and a range for every number: what a user sees comes from here."""
    for field in dataclasses.fields(SECTIONS[name]):
        rule = rule_of(SECTIONS[name], field.name)
        assert rule.keys() >= {"help", "choices", "near", "range", "path"}
        assert rule["help"]
        assert "\n" not in rule["help"]
        assert rule["path"] in ("", "in", "out")
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert rule["range"] is not None
