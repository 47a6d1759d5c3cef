"""Every key at, below and above its range, and every path with what no path can be."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config, ConfigError, from_mapping, parse_command_line, to_yaml
from megalite.config.read import read_yaml
from megalite.config.schema import SECTIONS
from megalite.config.values import Range, check_values, number

KEYS = {f"{s}.{f.name}": f for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
NUMBERS = {key: f.metadata["range"] for key, f in KEYS.items() if f.metadata["range"]}
PATHS = {key: f.metadata["path"] for key, f in KEYS.items() if f.metadata["path"]}


def having(key: str, value: Any) -> Config:
    section, name = key.split(".")
    part = dataclasses.replace(getattr(Config(), section), **{name: value})
    return dataclasses.replace(Config(), **{section: part})


def refused(key: str, value: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check_values(having(key, value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


def test_every_number_has_a_range_and_every_other_key_none() -> None:
    for key, f in KEYS.items():
        is_number = f.type in ("int", "float", "int | None", "float | None", "tuple[int, ...] | None")
        assert (f.metadata["range"] is not None) == is_number, key
        assert not (f.metadata["range"] and f.metadata["choices"]), key


def test_every_default_and_every_example_is_in_its_range() -> None:
    check_values(Config())
    for key, limits in NUMBERS.items():
        assert limits.holds(limits.example), key


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_at_and_beside_its_range(key: str) -> None:
    limits, many = NUMBERS[key], KEYS[key].type.startswith("tuple")
    whole = KEYS[key].type.startswith(("int", "tuple"))

    def value(x: float) -> Any:
        return (x,) if many else x

    step = 1 if whole else 0
    below = limits.least - step if whole else math.nextafter(limits.least, -math.inf)
    above = limits.most + step if whole else math.nextafter(limits.most, math.inf)
    for x, held in ((limits.least, not limits.above), (limits.most, not limits.below)):
        if held:
            check_values(having(key, value(x)))
        else:
            refused(key, value(x))
    huge = [x for x in (10**30, 1e308) if x > limits.most]
    outside: list[float] = [below, above, math.nan, math.inf, -math.inf, -1, -1e308, *huge]
    if not limits.zero:
        outside.append(0 if limits.least > 0 or limits.above else -1)
    else:
        check_values(having(key, value(0)))
        outside.append(limits.least / 2)
    for x in outside:
        if limits.zero and x == 0:
            continue
        said = refused(key, value(x))
        assert said.startswith(f"{key}={x} must be ")
        assert said.endswith(f", e.g. {number(limits.example)}")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1e999", "-1e999", "1e400000000", "9" * 5000, "-1", "0x10", "1e-400", "1__0", "٣"]
)
def test_numbers_written_in_odd_ways(key: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_command_line([f"{key}={text}"], default_preset=None, prog="")
    assert str(error.value).startswith(f"{key}=")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.run_dir=", "train.run_dir= does not name anything; write a folder to write to, e.g. train"),
        ("train.run_dir='  '", "does not name anything"),
        ("train.run_dir='runs/x '", "train.run_dir='runs/x ' begins or ends with a space; remove it"),
        ("train.run_dir=/", "train.run_dir=/ is the root of the file system"),
        ("train.run_dir=/proc/x", "train.run_dir=/proc/x is in /proc, which is not a disk"),
        ("train.run_dir=../../../../../../../../proc/x", "is in /proc, which is not a disk"),
        ("train.run_dir=/tmp/..", "is the root of the file system"),
        ("train.run_dir=null", "does not name anything"),
        ("train.run_dir=~/runs", "train.run_dir=~/runs: the shell does not expand ~ after ="),
        ("data.cache_dir=/sys", "data.cache_dir=/sys is in /sys"),
        ("train.export_hf=/dev/null", "is in /dev, which is not a disk"),
        ("optim.lr=1e30", "optim.lr=1e+30 must be 0, or at least 1e-12 and at most 10, e.g. 0.0003"),
        ("parallel.timeout_s=1e-9", "parallel.timeout_s=1e-09 must be at least 1 and at most 604800, e.g. 600"),
        ("train.threads=100000", "train.threads=100000 must be at least 0 and at most 1024, e.g. 8"),
        ("train.seed=100000000000000000000", "must be at least 0 and at most 9223372036854775807, e.g. 1234"),
        ("train.seed=1e20", "must be at least 0 and at most 9223372036854775807, e.g. 1234"),
        ("model.rope_theta=1e-30", "model.rope_theta=1e-30 must be greater than 1 and at most 1e12, e.g. 10000"),
        ("optim.eps=0", "optim.eps=0.0 must be at least 1e-20 and at most 1, e.g. 1e-8"),
        ("model.init_std=0", "model.init_std=0.0 must be at least 1e-6 and at most 10, e.g. 0.02"),
        ("optim.clip_grad=1e-300", "must be 0, or at least 1e-6 and at most 1e6, e.g. 1"),
        ("train.steps=1e18", "train.steps=1000000000000000000 must be at least 1 and at most 1e9, e.g. 1000"),
        ("data.valid={a: 5}", "data.valid.a=5 is a number, expected a file or folder; for one with that name write"),
        ("data.valid={a: }", "data.valid.a= does not name anything"),
        ("data.path=5", "data.path=5 is a number"),
        ("data.path=none", "data.path=none does not name anything"),
        ("tune.freeze='a\\nb'", None),
        ('tune.freeze="a\\nb"', "tune.freeze=a\\nb contains control characters"),
        ("optim.groups=" + "x" * 5000, "is 5000 bytes long; use at most 4096"),
    ],
)  # fmt: skip
def test_values_that_were_taken_without_a_word(override: str, message: str | None) -> None:
    if message is None:
        parse_command_line([override], default_preset=None, prog="")
        return
    with pytest.raises(ConfigError) as error:
        parse_command_line([override], default_preset=None, prog="")
    assert message in str(error.value)


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\0b", "contains control characters"),
        ("a\nb", "contains control characters"),
        ("a\x7fb", "contains control characters"),
        ("a\u2028b", "contains control characters"),
        ("a\udcffb", "contains control characters"),
        ("a/" + "x" * 256 + "/b", "a name of 256 bytes; file names have at most 255"),
        ("文" * 86, "a name of 258 bytes"),
        ("/".join(["x" * 100] * 60), "bytes long; use at most 4096"),
        ("~", "does not name anything"),
        ("~me/x", "does not expand ~ after ="),
    ],
)
def test_what_no_path_can_be(key: str, text: str, words: str) -> None:
    value = {"a": text} if key == "data.valid" else text
    assert words in refused(key, value)


@pytest.mark.parametrize("key", [key for key, way in PATHS.items() if way == "out"])
def test_where_no_folder_can_be(key: str, tmp_path: Path) -> None:
    for text in ("/", "//", "/.", "/proc", "/proc/self/x", "/sys/x", "/dev/x", "null", "true"):
        refused(key, text)
    (tmp_path / "link").symlink_to("/proc")
    assert "is in /proc" in refused(key, str(tmp_path / "link" / "x"))
    for text in ("runs/x", str(tmp_path), "/dev/shm/x", "a b", "文/件", "5", "x~"):
        check_values(having(key, text))


@pytest.mark.parametrize("key", [key for key, way in PATHS.items() if way == "in" and key != "data.valid"])
def test_paths_that_are_read(key: str) -> None:
    for text in ("runs/x", "/proc/self/fd/3", "/dev/stdin", "a b", "文/件", "./5", "5.jsonl", "v1.0", "x~"):
        check_values(having(key, text))


def test_paths_read_back_whatever_they_hold() -> None:
    for text in (
        "-",
        "--",
        "- a",
        "a: b",
        "#",
        "'",
        '"',
        "\\",
        "é",
        "文",
        "a\u200db",
        "!x",
        "&x",
        "*x",
        "?",
        "@",
        "`",
        "%",
        "{",
        "[",
        "a, b",
    ):
        config = having("train.run_dir", text)
        assert from_mapping(read_yaml(to_yaml(config), "x")) == config


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Range(1, 1000, 3), "at least 1 and at most 1000"),
        (Range(0, 1, 0.5, above=True), "greater than 0 and at most 1"),
        (Range(0, 1, 0.5, below=True), "at least 0 and less than 1"),
        (Range(1e-6, 1e6, 1, zero=True), "0, or at least 1e-6 and at most 1e6"),
    ],
)
def test_ranges_read_as_people_say_them(limits: Range, words: str) -> None:
    assert str(limits) == words
