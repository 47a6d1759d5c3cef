"""Plans for this machine's memory and for hardware that is not here."""

import dataclasses
import re

import pytest

from megalite.config import (
    ConfigError,
    Resolved,
    parse_command_line,
)
from megalite.plan import topology
from megalite.plan.costs import GIB, memory
from megalite.plan.describe import describe
from megalite.plan.topology import Machine, check_memory, lay_out, memory_table, other_machine


def planned(*argv: str) -> tuple[Resolved, Machine, str]:
    """What `--dry-run` of the example plans."""
    request = parse_command_line([*argv, "--dry-run"], default_preset="llama2-7b", prog="")
    asked = request.hardware
    assert asked is not None
    made = other_machine(request.config.train.device, asked.world or 1, asked.per_node, asked.gpu)
    config, why = lay_out(request.config, made, request.explicit)
    return config, made, why


def test_memory_of_this_machine_is_shared_among_its_ranks() -> None:
    device, free = topology.device_memory("cpu", 1)
    assert device == "cpu"
    assert 0 < free < 2**50
    assert topology.device_memory("cpu", 4)[1] < free / 2


def test_a_gpu_asked_for_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "gpu_memory", list)
    with pytest.raises(ConfigError, match=r"train\.device=cuda: .* use cpu or auto"):
        topology.device_memory("cuda", 1)
    assert topology.device_memory("auto", 1)[0] == "cpu"
    monkeypatch.setattr(topology, "gpu_memory", lambda: [80 * GIB, 40 * GIB])
    device, free = topology.device_memory("auto", 2)
    assert device == "cuda"
    assert 36 * GIB < free < 40 * GIB  # the smaller one, less what is kept free; each rank has its own


def test_a_plan_for_hardware_that_is_not_here() -> None:
    config, made, why = planned("world=64", "gpu=h100")
    assert (config.parallel.tp, config.parallel.pp, config.parallel.dp) == (2, 1, 32)
    assert "on 64 ranks (the smallest that fits" in why
    assert (made.ranks, made.local, made.device) == (64, 8, "cuda")
    text = describe(config, made)
    assert "hardware: 64 ranks, 8 a node; GPUs of 79.6 GiB (gpu=h100)" in text
    assert "fits: the fullest rank needs" in text
    check_memory(config, made)


def test_the_plan_of_a_70b_has_a_line_for_each_kind_of_rank() -> None:
    config, made, _ = planned("--preset", "llama3-70b", "world=64", "gpu=80", "parallel.pp=4")
    lines = memory_table(config, made).splitlines()
    assert lines[2].split() == [
        *("stage", "ranks", "weights", "gradients", "optimizer", "activations", "logits", "overhead", "total")
    ]
    assert [line.split()[:2] for line in lines[3:-1]] == [["0", "0-15"], ["1", "16-31"], ["2", "32-47"], ["3", "48-63"]]
    assert max(float(line.split()[-1]) for line in lines[3:-1]) == pytest.approx(
        memory(config, "cuda").total / GIB, abs=0.01
    )
    # stages that are alike are one line
    config, made, _ = planned("--preset", "llama3-70b", "world=64", "gpu=80", "parallel.stages=10,10,10,10,10,10,10,10")
    many = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_size=1))
    assert re.search(r"^ +1-6 +8-55 ", memory_table(many, made), re.MULTILINE)


def test_a_plan_that_does_not_fit_names_the_keys() -> None:
    config, made, why = planned("--preset", "llama3-70b", "world=8", "gpu=h100")
    assert "none fits" in why
    assert "does NOT fit: the fullest rank needs" in memory_table(config, made)
    with pytest.raises(ConfigError) as error:
        check_memory(config, made)
    assert "such ranks with parallel.tp=" in str(error.value)
    assert "tiny" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["world=0"], "world=0 must be at least 1 and at most 1e6, e.g. 64"),
        (["world=many"], "world=many: expected int"),
        (["world=8", "per_node=0"], "per_node=0 must be at least 1"),
        (["gpu=h1000"], "gpu=h1000 is not known; write its memory in GiB, e.g. gpu=80"),
        (["gpu="], "is not known; write its memory in GiB"),
        (["gpu=0"], "GiB of a GPU must be at least 1 and at most 2048"),
        (["gpu=-5"], "gpu=-5 is not known"),
        (["gpu=a100"], "write gpu=a100-40 or gpu=a100-80"),
        (["gpu=24", "train.device=cpu"], "gpu=24 and train.device=cpu contradict each other"),
        (["world=8", "world=16"], "one of them is given twice"),
    ],
)
def test_hardware_that_cannot_be(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        planned(*argv)
    assert words in str(error.value)


def test_hardware_is_for_plans() -> None:
    for argv in (["world=8"], ["gpu=h100"], ["--world", "8"]):
        with pytest.raises(ConfigError, match="is for --dry-run: a run uses the ranks that torchrun starts"):
            parse_command_line(argv, default_preset="tiny", prog="")
    request = parse_command_line(["--world=8", "--gpu", "h200", "--print-config"], default_preset="tiny", prog="")
    assert request.hardware is not None
    assert (request.hardware.world, request.hardware.gpu, request.hardware.per_node) == (8, "h200", None)
    assert other_machine("auto", 4, None, "24").local == 4
    assert other_machine("auto", 64, 4, "24").local == 4
    assert other_machine("cpu", 64, None, None).name == "nodes like this one"
