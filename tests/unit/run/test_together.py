"""Exit status and output of a failure in the world: one line for users' mistakes, a traceback for bugs."""

import pytest
import torch

from megalite.config import Config, parse_command_line
from megalite.config.errors import TrainingError
from megalite.parallel.groups import World
from megalite.run.together import describe_error, in_world


@pytest.fixture
def config() -> Config:
    words = ["train.device=cpu", "train.threads=1"]
    return parse_command_line(words, default_preset="tiny", prog="test").config


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("no room"), 2, "error: no room"),
        (TrainingError("diverged"), 2, "error: diverged"),
        (FileNotFoundError(2, "No such file or directory", "a.bin"), 2, "error: a.bin: No such file or directory"),
        (ImportError("No module named 'x'"), 2, "error: No module named 'x'; python -m megalite.doctor shows"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            1,
            "error: out of memory: CUDA out of memory. Tried",
        ),
        (
            RuntimeError("[gloo/x.cc] Connection closed\nmore"),
            1,
            "error: lost the connection to the other ranks: [gloo/x.cc] Connection closed",
        ),
    ],
)
def test_a_failure_is_one_line(
    config: Config, error: Exception, status: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def main(world: World) -> None:
        raise error

    assert in_world(config, main) == status
    (printed,) = capfd.readouterr().err.splitlines()
    assert printed.startswith(line)


def test_a_bug_keeps_its_traceback(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_world(config, lambda world: {}["missing"]) == 1
    printed = capfd.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.rstrip().endswith("KeyError: 'missing'")


def test_errors_of_the_system_name_their_file() -> None:
    assert describe_error(OSError(28, "No space left on device", "/x/y")) == "/x/y: No space left on device"
    assert describe_error(OSError("by hand")) == "by hand"
