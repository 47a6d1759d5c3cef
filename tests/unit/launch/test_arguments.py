"""The tools' command lines: a mistake is one line, printed by rank 0 alone."""

import pytest

from megalite.launch import arguments
from megalite.launch.arguments import Parser


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments.time, "sleep", lambda seconds: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def parser() -> Parser:
    made = Parser(prog="tool", description="A tool.\n\n    tool --steps 3")
    made.add_argument("--steps", type=int)
    return made


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--step", "3"], "unrecognized arguments: --step 3"),  # no abbreviations
    ],
)
def test_a_mistake_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(argv)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {message}; see tool --help\n"
    assert printed.out == ""


def test_other_ranks_exit_silently(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["--steps", "x"])
    assert end.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_broken_environment_does_not_hide_the_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(SystemExit):
        parser().parse_args(["--steps", "x"])
    assert "invalid int value" in capsys.readouterr().err


def test_help_keeps_the_lines_of_the_description() -> None:
    assert "A tool.\n\n    tool --steps 3\n" in parser().format_help()
