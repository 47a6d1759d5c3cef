"""Which topology is chosen, what does not fit and what would, and plans for hardware that is not here."""

import contextlib
import dataclasses
import itertools
import re
import time
from typing import Any

import pytest
from models import LLAMA_7B

from megalite.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    ParallelConfig,
    Resolved,
    TrainConfig,
    check,
    parse_command_line,
    reopen,
    resolve,
)
from megalite.config.schema import MOST_LAYERS
from megalite.plan.costs import GIB, memory
from megalite.plan.describe import describe
from megalite.plan.topology import Machine, check_memory, choose_topology, lay_out, other_machine

TRAIN = TrainConfig(seq_len=2048, micro_batch_size=1, global_batch_size=64, dtype="bf16")


def machine(gib: float, ranks: int, local: int = 8) -> Machine:
    return Machine(ranks, local, "cuda", int(gib * GIB), "GPUs of a test")


def make(ranks: int, train: dict[str, Any] | None = None, **parallel: Any) -> Resolved:
    config = Config(
        model=LLAMA_7B, parallel=ParallelConfig(**parallel), train=dataclasses.replace(TRAIN, **(train or {}))
    )
    return resolve(config, ranks)


def chosen(
    gib: float, ranks: int, explicit: frozenset[str] = frozenset(), local: int = 8, **parallel: Any
) -> tuple[tuple[int | None, int | None], str]:
    config = Config(model=LLAMA_7B, parallel=ParallelConfig(**parallel), train=TRAIN)
    config, said = choose_topology(config, machine(gib, ranks, local), explicit)
    return (config.parallel.tp, config.parallel.pp), said


def planned(*argv: str) -> tuple[Resolved, Machine, str]:
    """What `--dry-run` of the example plans."""
    request = parse_command_line([*argv, "--dry-run"], default_preset="llama2-7b", prog="")
    asked = request.hardware
    assert asked is not None
    made = other_machine(request.config.train.device, asked.world or 1, asked.per_node, asked.gpu)
    config, why = lay_out(request.config, made, request.explicit)
    return config, made, why


def test_instruction_tuning_of_a_7b_fits_eight_gpus_of_80_gib() -> None:
    request = parse_command_line(["--preset", "sft-7b"], default_preset=None, prog="")
    eight = machine(0.94 * 80, 8)
    config, _ = choose_topology(request.config, eight, request.explicit)
    config = resolve(config, 8)
    check(config, 8)
    assert (config.parallel.tp, config.parallel.pp, config.parallel.dp, config.parallel.zero) == (1, 1, 8, 1)
    assert 70 * GIB < check_memory(config, eight).total < 75.2 * GIB


def test_the_smallest_topology_that_fits_is_chosen() -> None:
    sizes = {}
    for gib in (24, 40, 80, 200):
        (tp, pp), said = chosen(gib, 16)
        fitting = [
            (a * b, -a)
            for a, b in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16))
            if a * b <= 16 and memory(make(16, tp=a, pp=b), "cuda").total <= gib * GIB
        ]
        assert (tp * pp, -tp) == min(fitting)
        assert "the smallest that fits" in said
        assert f"tp {tp} x pp {pp} x dp {16 // tp // pp} on 16 ranks" in said
        sizes[gib] = tp * pp
    assert sizes[200] == 1
    assert sizes[24] > sizes[40] >= sizes[80] > 1


def test_tp_stays_within_a_node() -> None:
    assert chosen(24, 16, local=2)[0][0] <= 2
    assert chosen(24, 16, local=8)[0][0] == 8


def test_where_nothing_fits_the_least_is_named() -> None:
    (tp, pp), said = chosen(4, 4)
    assert tp * pp == 4
    assert "none fits; this one needs the least memory" in said


def test_what_the_user_set_is_never_changed() -> None:
    both = frozenset({"parallel.tp", "parallel.pp"})
    assert chosen(24, 8, both, tp=1, pp=2) == ((1, 2), "tp 1 x pp 2 x dp 4 on 8 ranks (as asked)")
    assert chosen(24, 8, frozenset({"parallel.tp"}), tp=1)[0][0] == 1
    assert chosen(24, 8, frozenset({"parallel.pp"}), pp=8)[0] == (1, 8)
    assert chosen(24, 6, frozenset({"parallel.stages"}), stages=(10, 10, 12))[0][1] == 3


def test_a_presets_topology_holds_where_it_divides_the_ranks() -> None:
    assert chosen(1000, 8, tp=2, pp=2) == ((2, 2), "tp 2 x pp 2 x dp 2 on 8 ranks (the preset's)")
    assert chosen(1000, 2, tp=2, pp=2)[0] == (1, 1)


def test_a_chosen_tp_divides_the_sequence() -> None:
    config = Config(model=LLAMA_7B, train=dataclasses.replace(TRAIN, seq_len=2047))
    config, _ = choose_topology(config, machine(24, 8), frozenset())
    assert config.parallel.tp == 1
    check(resolve(config, 8), 8)


def test_what_does_not_fit_is_refused_with_bytes_and_remedies() -> None:
    config = make(2, tp=2)
    with pytest.raises(ConfigError) as error:
        check_memory(config, machine(24, 2))
    text = str(error.value)
    assert "6.74e9 parameters does not fit 2 ranks of 24.0 GiB per GPU: tp 2 x pp 1 x dp 1 needs" in text
    for kind in ("weights", "gradients", "optimizer", "activations", "logits", "overhead"):
        assert kind in text
    assert f"GPUs of {-(-memory(config, 'cuda').total / 0.94 // GIB):.0f} GiB" in text
    assert check_memory(config, machine(1000, 2)) == memory(config, "cuda")


@pytest.mark.parametrize("gib", [16, 20, 24, 30, 40, 50, 60])
@pytest.mark.parametrize("keys", [{"tp": 2}, {"pp": 2}, {"tp": 4, "pp": 2}, {}])
@pytest.mark.parametrize("micro", [1, 4])
def test_every_remedy_that_it_names_would_do(gib: float, keys: dict[str, int], micro: int) -> None:
    config = make(8, {"micro_batch_size": micro}, **keys)
    try:
        check_memory(config, machine(gib, 8))
    except ConfigError as error:
        named = str(error).split("what would fit: ")[1].split("; or ")
    else:
        return
    assert named
    for remedy in named:
        ranks, larger = 8, gib
        if found := re.match(r"(\d+) such ranks with ", remedy):
            ranks = int(found[1])
        if found := re.match(r"GPUs of (\d+) GiB", remedy):
            larger = int(found[1]) * 0.94
        changed = config
        if "parallel.tp=" in remedy:
            changed = reopen(config, "parallel.tp", "parallel.pp", "parallel.dp")
        for key, value in re.findall(r"([a-z]+\.\w+)=(\w+)", remedy):
            section, name = key.split(".")
            part = dataclasses.replace(getattr(changed, section), **{name: int(value) if value.isdigit() else value})
            changed = dataclasses.replace(changed, **{section: part})
        changed = resolve(changed, ranks)
        check(changed, ranks)
        check_memory(changed, machine(larger, ranks))


def test_tuning_may_take_lora() -> None:
    config = dataclasses.replace(make(1), checkpoint=CheckpointConfig(load="runs/base"))
    with pytest.raises(ConfigError, match=r"what would fit: tune\.mode=lora; or"):
        check_memory(config, machine(40, 1))
    with pytest.raises(ConfigError) as error:
        check_memory(make(1), machine(40, 1))
    assert "lora" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "first_try", "tiny"),
    [([], True, True), ([], False, False), (["--preset", "llama3-70b"], False, False)],
)
def test_tiny_is_advice_for_those_who_have_asked_for_nothing(argv: list[str], first_try: bool, tiny: bool) -> None:
    config, _, _ = planned(*argv, "world=1", "gpu=16")
    with pytest.raises(ConfigError) as error:
        check_memory(config, machine(16, 1), first_try)
    assert ("--preset tiny" in str(error.value)) == tiny
    # and the machine at hand is not the only one to plan for
    with pytest.raises(ConfigError, match="--dry-run world=64 gpu=h100 plans for other hardware"):
        check_memory(config, Machine(1, 1, "cpu", 16 * GIB))


@pytest.mark.parametrize("argv", [[], ["parallel.pp=100"], ["tune.freeze=layers.*"], ["train.ramp_start=1"]])
def test_the_deepest_model_is_planned_at_once(argv: list[str]) -> None:
    """Planning grows with the layers, not with their square."""
    ramp = ["train.ramp_samples=1000000000", "train.global_batch_size=65536", "train.steps=1000000"]
    began = time.process_time()
    argv = [*argv, *(ramp if "train.ramp_start=1" in argv else []), f"model.num_layers={MOST_LAYERS}", "gpu=80"]
    config, made, _ = planned(*argv, "world=800", "train.global_batch_size=65600")
    describe(config, made)
    with contextlib.suppress(ConfigError):
        check_memory(config, made)
    assert time.process_time() - began < 5


def test_deeper_ones_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_layers=100000 must be at least 1 and at most 1000, e.g. 32"):
        planned("model.num_layers=100000")


@pytest.mark.parametrize("argv", [["parallel.stages=1000"], ["parallel.stages=4,4", "parallel.pp=3"]])
def test_stages_that_do_not_add_up_are_told_by_the_checks(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"parallel\.stages="):
        planned("--preset", "tiny", "world=6", "gpu=80", *argv)
