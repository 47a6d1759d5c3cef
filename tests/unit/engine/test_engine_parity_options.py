"""Every model option, at every kind of topology: loss and all gradients, in float64.

In a covering set each value of an option occurs with each value of every other. It is compared with a model written
from torch functions and formulas (formulas.py).
"""

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from formulas import LLAMA3, YARN, formula_reference, largest_error, make_config
from parity import TOLERANCE

from megalite.config import Config

LEVERS: dict[str, tuple] = {
    "tp": (1, 2, 4),
    "sp": (False, True),
    "pp": (1, 2),
    "dp": (1, 2),
    "zero": (0, 1),
    "schedule": ("1f1b", "gpipe", "interleaved", "zb-h1"),
    "recompute": ("none", "selective", "full"),
    "isolated": (False, True),
    "label_smoothing": (0.0, 0.1),
    "dropout": (0.0, 0.3),
    "attention_dropout": (0.0, 0.2),
    "tie_embeddings": (False, True),
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"),
    "position": ("rope", "learned"),
    "linear_bias": (False, True),
    "qkv_bias": (False, True),
    "qk_norm": (False, True),
    "rope_fraction": (1.0, 0.67),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
    "sliding_window": (None, 5),
}
PARALLEL = ("tp", "sp", "pp", "dp", "zero", "schedule", "recompute")
Case = dict[str, Any]


def valid(case: Case) -> bool:
    """Whether the levers named so far fit together; those not named yet can be chosen to fit."""
    if (case.get("sp") and case.get("tp") == 1) or (case.get("zero") and case.get("dp") == 1):
        return False
    rotary = case.get("rope_fraction", 1.0) != 1.0 or case.get("rope_scaling", "none") != "none"
    return not (rotary and case.get("position") == "learned")


def pairs(case: Case) -> Iterator[tuple]:
    return itertools.combinations(case.items(), 2)


@functools.cache
def covering() -> tuple[Case, ...]:
    """Cases in which every valid pair of two levers' values occurs: each takes what is new in most pairs (greedy)."""
    rng = random.Random(0)
    todo = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(LEVERS, 2)
        for x in LEVERS[a]
        for y in LEVERS[b]
        if valid({a: x, b: y})
    }
    cases = []
    while todo:
        candidates = []
        for start in rng.sample(sorted(todo, key=str), min(len(todo), 20)):
            case = dict(start)
            for lever in rng.sample(list(LEVERS), len(LEVERS)):
                values = [v for v in LEVERS[lever] if valid(case | {lever: v})]
                if lever not in case:
                    gains = [sum(set(p) <= (case | {lever: v}).items() for p in todo) for v in values]
                    case[lever] = values[gains.index(max(gains))]
            candidates.append({lever: case[lever] for lever in LEVERS})
        best = max(candidates, key=lambda case: len(todo & set(pairs(case))))
        cases.append(best)
        todo -= set(pairs(best))
    return tuple(cases)


def label(case: Case) -> str:
    return "-".join(
        f"{lever}={value}" if not isinstance(value, bool) else lever
        for lever, value in case.items()
        if value != LEVERS[lever][0]
    )


def config_of(case: Case) -> Config:
    model = {lever: v for lever, v in case.items() if lever not in (*PARALLEL, "isolated", "label_smoothing")}
    model |= {"linear": {"rope_factor": 3.0}, "llama3": LLAMA3, "yarn": YARN}.get(case["rope_scaling"], {})
    parallel = {lever: case[lever] for lever in PARALLEL}
    if case["schedule"] == "interleaved":
        parallel["chunks"], model["num_layers"] = 2, 2 * case["pp"]
    return make_config(model, parallel, smoothing=case["label_smoothing"])


@pytest.mark.parametrize("case", covering(), ids=label)
def test_covering_set(case: Case) -> None:
    config = config_of(case)
    weights, loss, grads = formula_reference(config, case["isolated"])
    assert largest_error(config, weights, case["isolated"], loss, grads) <= TOLERANCE


def test_the_covering_set_covers() -> None:
    found = set(itertools.chain.from_iterable(pairs(case) for case in covering()))
    for a, b in itertools.combinations(LEVERS, 2):
        for x, y in itertools.product(LEVERS[a], LEVERS[b]):
            assert (((a, x), (b, y)) in found) == valid({a: x, b: y})
    assert len(covering()) <= 40
