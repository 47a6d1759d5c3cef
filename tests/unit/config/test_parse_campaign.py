"""Fuzzed configurations: each is planned as it was written, or refused in one line, and within two seconds."""

import dataclasses
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from campaign import rounds
from odd_values import INSERTED, ODD

from megalite.config import Config, ConfigError, from_mapping, parse_command_line, resolve, to_yaml
from megalite.config.flags import SPECIAL, _table
from megalite.config.parse import PRESETS, preset_names
from megalite.config.read import read_yaml
from megalite.config.schema import SECTIONS
from megalite.config.values import number
from megalite.plan import topology
from megalite.plan.describe import describe
from megalite.run.command import understand

KEYS = {f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
SECONDS = 2.0


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError in what takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def plan(argv: list[str], drawn: random.Random) -> Config:
    """All that `--dry-run` does with a command line, for ranks and memory that are drawn."""
    preset = drawn.choice(preset_names())
    told = parse_command_line(argv, default_preset=preset, prog="fuzz").config
    request = understand(argv, preset, drawn.random() < 0.5, print)
    ranks, gib = drawn.choice((1, 2, 6, 8, 64)), drawn.choice((8, 24, 80, 10**6))
    machine = topology.Machine(ranks, min(8, ranks), "cuda", gib * 2**30)
    try:
        config, _ = topology.lay_out(request.config, machine, request.explicit)
        assert describe(config, machine)
        topology.check_memory(config, machine)
    except ConfigError as error:
        assert_one_line(error)
        return told
    assert resolve(from_mapping(read_yaml(to_yaml(config), "again")), ranks) == config
    return told


def assert_one_line(error: Exception) -> None:
    text = str(error)
    assert "\n" not in text, text
    # Python's own errors name neither key nor file
    assert not isinstance(error, UnicodeError), text
    assert "null byte" not in text, text
    assert all(c.isprintable() or c.isspace() or ord(c) > 127 for c in text), text
    assert len(text) < 12000, text[:500]


def same(value: Any, text: Any) -> bool:
    """Whether `value` is what `text` says, read in another way than megalite does."""
    if value is None:
        return text in ("null", "~", "", "auto")
    if isinstance(value, bool):
        return text.lower() == str(value).lower()
    if isinstance(value, int | float):
        plain = Decimal(text.replace("_", ""))
        return value == plain if isinstance(value, int) else value == float(plain)
    if isinstance(value, tuple):
        return [str(v) for v in value] == [str(int(t)) for t in (text.split(",") if isinstance(text, str) else text)]
    if isinstance(value, dict):
        return value == (text or {}) or (not value and text in ("null", "~"))
    return bool(value == text)


def outcome(argv: list[str], drawn: random.Random, check: Callable[[Config], None]) -> str:
    """ "equal", or the name of what refused it; anything else fails the test."""
    try:
        with within(SECONDS):
            config = plan(argv, drawn)
    except (ValueError, OSError) as error:
        # what entry.pretrain tells in one line
        assert_one_line(error)
        # the kind: the message without the names and numbers in it
        return "refused: " + re.sub(r"['\"].*?['\"]|\S*[=/\\.]\S*|[-\d]\S*", "", str(error))[:40].strip()
    except SystemExit as end:
        return f"help, status {end.code}"
    check(config)
    assert from_mapping(read_yaml(to_yaml(config), "again")) == config
    return "equal"


def usual(key: str) -> list[str]:
    """Values that the key takes, its limits among them."""
    limits, f = KEYS[key].metadata["range"], KEYS[key]
    if limits:
        return [str(limits.example), number(limits.least), number(limits.most), "8"]
    return [*f.metadata["choices"]] or (["true", "false"] if f.type == "bool" else ["a/b", "x y", "'q: r'", "-"])


def override(drawn: random.Random) -> tuple[list[str], Callable[[Config], None]]:
    """One to three keys, each with a value of its own or an odd one."""
    chosen = {
        key: drawn.choice((*ODD[:60], *5 * usual(key))) for key in drawn.sample(list(KEYS), drawn.choice((1, 1, 2, 3)))
    }

    def check(config: Config) -> None:
        for key, text in chosen.items():
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            quoted = text[:1] in ("[", "{", '"', "'")
            assert same(value, yaml.load(text, yaml.BaseLoader) if quoted else text), (key, text, value)

    form = drawn.choice(("{}={}", "--{}={}"))
    return [form.format(*pair) for pair in chosen.items()], check


def mutated(text: str, drawn: random.Random) -> str:
    for _ in range(drawn.choice((1, 1, 2, 4))):
        at, end = sorted((drawn.randrange(len(text) + 1), drawn.randrange(len(text) + 1)))
        kind = drawn.choice((0, 1, 2, 3, 4, 5, 5, 6, 6, 6))
        if kind == 0:
            text = text[:at] + drawn.choice(INSERTED) + text[at:]
        elif kind == 1:
            text = text[:at] + text[min(end, at + 9) :]
        elif kind == 2:
            text = text[:end] + text[at:end] + text[end:]
        elif kind == 3:
            text = text[:at] + chr(drawn.choice((drawn.randrange(32, 127), drawn.randrange(0xD000)))) + text[at + 1 :]
        elif kind == 4:
            lines = text.splitlines(keepends=True)
            drawn.shuffle(lines)
            text = "".join(lines)
        elif kind == 6:
            text = re.sub(r"(?<=: )[0-9]+\\b", lambda m: str(int(m[0]) * 2) if drawn.random() < 0.1 else m[0], text)
        else:
            found = list(re.finditer(r"(?<=: )[^,{}\n]+", text))
            one = drawn.choice(found) if found else None
            text = text[: one.start()] + drawn.choice(ODD) + text[one.end() :] if one else text
    return text


def file(drawn: random.Random, folder: Path) -> tuple[list[str], Callable[[Config], None]]:
    """A preset or a whole resolved configuration, mutated as text."""
    preset = (PRESETS / f"{drawn.choice(preset_names())}.yaml").read_text()
    source = drawn.choice((preset, to_yaml(from_mapping(read_yaml(preset, "x")))))
    text = mutated(source, drawn)
    path = folder / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def check(config: Config) -> None:
        for section, values in (yaml.load(text.removeprefix("\ufeff"), yaml.BaseLoader) or {}).items():
            for name, word in (values or {}).items():
                assert same(getattr(getattr(config, section), name), word), (section, name, word)

    return ["--config", str(path)], check


def words(drawn: random.Random) -> tuple[list[str], Callable[[Config], None]]:
    """A command line of flags, known and unknown, of values, and of pieces of them."""
    flags = [
        *_table(),
        *SPECIAL,
        *(key.split(".")[1] for key in KEYS),
        "zzz",
        "",
        "preset",
        "config",
        "dry-run",
        "world",
    ]
    argv = []
    for _ in range(drawn.randrange(1, 9)):
        flag = drawn.choice(flags).replace("_", drawn.choice("-_"))
        argv.append(
            drawn.choice(("--{}", "-{}", "--no-{}", "{}", "--{}={}", "{}={}", "--train.{}")).format(
                flag, drawn.choice(ODD)
            )
        )
        argv += drawn.sample(ODD, drawn.choice((0, 1, 1, 2)))
    # a process is never given a NUL
    argv = [word.replace("\0", "0") for word in argv]
    return argv, lambda config: None


@pytest.mark.timeout(1800)
def test_fuzzed_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but a Config that says what was written, or a ConfigError of one line, in two seconds each."""
    count = rounds(300, 6000)
    found: Counter[str] = Counter()
    for seed in range(count):
        drawn = random.Random(seed)
        argv, check = (override, lambda d: file(d, tmp_path), words)[seed % 3](drawn)
        try:
            found[outcome(argv, drawn, check)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {[word[:200] for word in argv]}: {error!r}") from error
    kinds = [kind for kind in found if kind.startswith("refused")]
    refused = sum(found[kind] for kind in kinds)
    with capsys.disabled():
        print(
            f"\n{count} fuzzed configurations: {found['equal']} equal to what was written, {refused} refused in "
            f"{len(kinds)} ways, {found['help, status 0']} asked for help"
        )
    assert found["equal"] > count // 10
    assert refused > count // 3
