"""Keys of a JSON file: type, range, absent and null, each mistake with file, key and value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite.exchange.hf_fields import Fields, as_json, read_json

VALUES = {"n": 3, "x": 0.5, "on": True, "word": "silu", "null": None, "big": 10**400, "list": [1], "int": 2}


def fields() -> Fields:
    return Fields(VALUES, "config.json")


def test_values_are_returned_as_they_are() -> None:
    f = fields()
    assert (f.whole("n"), f.number("x"), f.flag("on"), f.word("word")) == (3, 0.5, True, "silu")
    assert f.number("int") == 2.0
    assert f.choice("word", {"silu": "swiglu"}, "silu") == "swiglu"


def test_absent_and_null_have_defaults_of_their_own() -> None:
    f = fields()
    assert f.whole("absent", 7) == 7
    assert f.whole("null", 7, 8) == 8
    assert f.whole("absent", None) is None
    assert f.choice("absent", {"silu": "swiglu"}, "silu") == "swiglu"


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.whole("absent"), "config.json: absent is missing; add it"),
        (lambda f: f.whole("null", 7), "config.json: null=null is not of type int"),
        (lambda f: f.whole("on"), "config.json: on=true is not of type int"),
        (lambda f: f.whole("x"), "config.json: x=0.5 is not of type int"),
        (lambda f: f.whole("n", low=4), "config.json: n=3 must be from 4 to 2147483647"),
        (lambda f: f.number("on"), "config.json: on=true is not of type float"),
        (lambda f: f.number("x", above=0.5), "config.json: x=0.5 must be a finite number and above 0.5"),
        (
            lambda f: f.number("x", low=1, below=2),
            "config.json: x=0.5 must be a finite number and at least 1 and below 2",
        ),
        (lambda f: f.number("big"), "must be a finite number"),
        (lambda f: f.flag("n"), "config.json: n=3 is not of type bool"),
        (
            lambda f: f.choice("word", {"gelu": ""}, "gelu"),
            'config.json: word="silu" is not supported; use one of gelu',
        ),
        (lambda f: f.neutral({"n": (0,)}, "is refused"), "config.json: n=3 is refused"),
        (lambda f: f.neutral({"list": ([],)}, "is refused"), "config.json: list=[1] is refused"),
    ],
)
def test_a_mistake_names_file_key_and_value(read: Callable[[Fields], Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read(fields())
    assert message in str(error.value)
    assert len(str(error.value)) < 200


def test_neutral_values_pass() -> None:
    fields().neutral({"n": (3, 4), "null": (), "absent": ()}, "is refused")


def test_values_in_messages_are_short_json() -> None:
    assert as_json({"a": None, "b": "x\ny"}) == '{"a": null, "b": "x\\ny"}'
    assert len(as_json("x" * 1000)) == 80
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert as_json(nested) == "<list>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds list, not an object of keys"),
        ("{", "not JSON"),
        ("[" * 100_000, "not usable JSON (nested too deeply)"),
        (None, "no such file"),
    ],
)
def test_files_that_hold_no_object(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_json(path)
    assert message in str(error.value)
    path.write_text(json.dumps(VALUES))
    assert read_json(path) == VALUES
