"""YAML and overrides as text, and text as the type of its key: YAML's own guesses are switched off."""

from pathlib import Path

import pytest
import yaml
from command_lines import from_yaml, parse

from megalite.config import (
    ConfigError,
)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=20", 20),
        ("train.steps=1_000", 1000),
        ("train.steps=1e3", 1000),
        ("train.steps=2.5e2", 250),
        ("train.steps=+7", 7),
        ("train.seed=9007199254740993e0", 9007199254740993),  # not by way of a float
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1E-3", 1e-3),
        ("optim.lr=.5", 0.5),
        ("optim.lr=3", 3.0),
        ("optim.lr=010", 10.0),
        ("parallel.sp=true", True),
        ("parallel.sp=False", False),
        ("parallel.tp=null", None),
        ("parallel.tp=~", None),
        ("parallel.tp=auto", None),
        ("parallel.tp=", None),
        ("parallel.stages=[2, 3, 2]", (2, 3, 2)),
        ("parallel.stages=2,3,2", (2, 3, 2)),
        ("parallel.stages=7", (7,)),
        ("train.run_dir=no", "no"),
        ("train.run_dir=12:30:45", "12:30:45"),
        ("train.run_dir=2024-01-01", "2024-01-01"),
        ("train.run_dir=010", "010"),
        ("train.run_dir='a b: c'", "a b: c"),
        ('train.run_dir="1e-3"', "1e-3"),
        ("train.run_dir=a=b", "a=b"),
        ("data.valid={en: a/b, zh: c}", {"en": "a/b", "zh": "c"}),
        ("data.valid=", {}),
    ],
)
def test_values(override: str, expected: object) -> None:
    request = parse(override)
    key = override.partition("=")[0]
    section, name = key.split(".")
    value = getattr(getattr(request.config, section), name)
    assert value == expected
    assert type(value) is type(expected)
    assert request.explicit == {key}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=2.5", "train.steps=2.5: expected int; write a whole number, e.g. 8"),
        (
            "train.steps=010",
            "train.steps=010: expected int; a leading zero means octal to some YAML parsers; write it without",
        ),
        ("train.steps=0x10", "train.steps=0x10: expected int; write a whole number, e.g. 8"),
        ("train.steps=12:30:45", "train.steps=12:30:45: expected int; write a whole number, e.g. 8"),
        ("train.steps=true", "train.steps=true: expected int; write a whole number, e.g. 8"),
        ("train.steps=null", "train.steps=null: expected int; write a whole number, e.g. 8"),
        ("train.steps=1e-3", "train.steps=1e-3: expected int; write a whole number, e.g. 8"),
        ("train.steps=[1, 2]", "train.steps=['1', '2']: expected int, not a list or mapping"),
        ("optim.lr=fast", "optim.lr=fast: expected float; write a number, e.g. 3e-4"),
        ("optim.lr=nan", "optim.lr=nan: expected float; write a number, e.g. 3e-4"),
        ("optim.lr=inf", "optim.lr=inf: expected float; write a number, e.g. 3e-4"),
        ("optim.lr=1,5", "optim.lr=1,5: expected float; write a number, e.g. 3e-4"),
        ("parallel.sp=no", "parallel.sp=no: expected bool; write true or false"),
        ("parallel.sp=on", "parallel.sp=on: expected bool; write true or false"),
        ("parallel.sp=1", "parallel.sp=1: expected bool; write true or false"),
        ("parallel.tp=two", "parallel.tp=two: expected int; write a whole number, e.g. 8"),
        ("parallel.stages=[1, x]", "parallel.stages=x: expected int; write a whole number, e.g. 8"),
        *(
            (
                f"parallel.schedule={name}",
                f"parallel.schedule={name}: must be one of 1f1b, gpipe, interleaved, zb-h1; did you mean {meant}?",
            )
            for name, meant in [
                ("gpip", "gpipe"),
                ("interleaved_1f1b", "interleaved"),
                ("zero_bubble", "zb-h1"),
                ("zbh1", "zb-h1"),
            ]
        ),
        ("parallel.schedule=xyz", "parallel.schedule=xyz: must be one of 1f1b, gpipe, interleaved, zb-h1"),
        ("train.dtype=xyz", "train.dtype=xyz: must be one of fp32, bf16, fp16, fp64"),
        ("data.valid=en", "data.valid='en': expected NAME: PREFIX pairs, e.g. data.valid.en=data/en_text_document"),
        ("train.run_dir=[a]", "train.run_dir=['a']: expected text, not a list or mapping"),
    ],
)
def test_wrong_types(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(override)
    assert str(error.value) == message


def test_yaml_guesses_are_off(tmp_path: Path) -> None:
    config = from_yaml(
        """
        optim: {lr: 1e-3, weight_decay: 1}
        train: {run_dir: 12:30:45, steps: 1e2}
        data: {path: no, tokenizer: 2024-01-01, valid: {on: 0o10, no: "1e-3x"}, cache_dir: 'yes'}
        parallel: {stages: [2, 2], tp: null, sp: false}
        """,
        tmp_path,
    )
    assert (config.optim.lr, config.optim.weight_decay) == (1e-3, 1.0)
    assert (config.train.run_dir, config.train.steps) == ("12:30:45", 100)
    assert (config.data.path, config.data.tokenizer, config.data.cache_dir) == ("no", "2024-01-01", "yes")
    assert config.data.valid == {"on": "0o10", "no": "1e-3x"}
    assert (config.parallel.stages, config.parallel.tp, config.parallel.sp) == ((2, 2), None, False)
    # and what PyYAML would have made of the same words
    assert yaml.safe_load("[1e-3, no, 12:30:45, 010]") == ["1e-3", False, 45045, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 1\n  seq_len: 8\n  steps: 2\n", "line 4: key 'steps' is written twice; keep one of them"),
        ("train: {steps: 1}\nmodel: {}\ntrain: {seq_len: 2}\n", "line 3: key 'train' is written twice"),
        ("train: {steps: no}\n", "train.steps=no: expected int"),
        ("parallel: {sp: yes}\n", "parallel.sp=yes: expected bool; write true or false"),
        ("train: {steps: 12:30:45}\n", "train.steps=12:30:45: expected int"),
        ("train: {steps: 010}\n", "train.steps=010: expected int; a leading zero"),
        ("train: {step: 1}\n", "unknown key train.step; did you mean train.steps?"),
        ("trian: {steps: 1}\n", "unknown key trian"),
        ("train: 3\n", "train is a section; write e.g. train.run_dir=..."),
        ("- train\n", "list"),
        ("train: {steps: 1\n", "line 2: not valid YAML"),
        ("[a, b]: 1\n", "a key must be plain text"),
        ("train: {<<: {steps: 1}}\n", "unknown key train.<<"),
        ("data: {valid: {en: [a, b]}}\n", "expected NAME: PREFIX pairs"),
        ("train: {run_dir: {a: b}}\n", "expected text, not a list or mapping"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        from_yaml(text, tmp_path)
    assert message in str(error.value)
    assert "run.yaml" in str(error.value) or "line" not in message
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        parse("--config", str(tmp_path / "missing.yaml"))
