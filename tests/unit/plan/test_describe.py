"""The plan that --dry-run prints."""

import pytest

from megalite.config import parse_command_line
from megalite.plan.describe import describe
from megalite.plan.topology import lay_out, other_machine


def plan(*argv: str) -> str:
    request = parse_command_line(["--preset", "llama2-7b", *argv], default_preset=None, prog="test")
    machine = other_machine("auto", 16, None, "h100")
    return describe(lay_out(request.config, machine, request.explicit)[0], machine)


def test_every_line() -> None:
    lines = plan("parallel.tp=2", "parallel.pp=4", "train.steps=10", "train.global_batch_size=64").splitlines()
    assert lines[0] == "plan:"
    assert lines[1] == "  mesh: pp 4 x dp 2 x cp 1 x tp 2, sequence parallel on"
    # 64 samples over 2 replicas of 1 sample a microbatch: 32, and a bubble of (p - 1) / (m + p - 1)
    assert lines[2].startswith("  layers by stage: ")
    assert lines[2].endswith("; 1f1b, 32 microbatches, bubble 8.6%")
    assert sum(int(n) for n in lines[2].split(": ")[1].split(";")[0].split(", ")) == 32
    assert lines[3] == "  hardware: 16 ranks, 8 a node; GPUs of 79.6 GiB (gpu=h100)"
    # 6 x 6.6e9 parameters of matrices, and attention's scores: docs/performance counts them the same way
    assert lines[-1].startswith("  work: 42.")
    assert lines[-1].endswith(" TFLOP per step, 2.6e6 tokens in all")


@pytest.mark.parametrize(("key", "words"), [("train.epochs=2", "2 epochs in all"), ("parallel.tp=1", "parallel off")])
def test_what_is_not_known_yet_or_off(key: str, words: str) -> None:
    assert words in plan(key, "parallel.pp=1") if "tp" not in key else words in plan(key)
