"""Parameters and FLOPs of a model and of a run, by the table of parameters; no topology changes them. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megalite.config import Resolved, ResolvedModel
from megalite.config.parameters import TABLE, Shape, row_of
from megalite.config.shapes import rows_of, shape_of, sizes


def layer_parameters(m: ResolvedModel) -> int:
    """Parameters of one transformer block."""
    return sum(math.prod(shape_of(row, m)) for row in rows_of(m) if row.where == "layer")


def parameters(m: ResolvedModel) -> int:
    """Parameters of the whole model; tied weights count once."""
    ends = sum(math.prod(shape_of(row, m)) for row in rows_of(m) if row.where != "layer")
    return m.num_layers * layer_parameters(m) + ends


def trained_parameters(config: Resolved) -> int:
    """Parameters of the whole model, adapters among them, that are trained."""
    return _elements(config.shapes.trained)


def _elements(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def describe_trained(config: Resolved) -> str:
    """How many parameters are trained, of how many."""
    some = trained_parameters(config)
    every = parameters(config.model) + _elements(config.shapes.factors)
    return (
        f"tune.mode={config.tune.mode} trains {some / 1e6:.4g}e6 of {every / 1e6:.1f}e6 parameters ({some / every:.2%})"
    )


def describe_muon(config: Resolved) -> str:
    """How many parameters Muon updates, and how many are left to AdamW."""
    hidden, every = set(config.shapes.hidden), config.shapes.trained
    sizes = {True: 0, False: 0}
    for name, shape in every.items():
        sizes[name in hidden] += math.prod(shape)
    return (
        f"optim.name=muon: Muon updates {sizes[True] / 1e6:.4g}e6 parameters in {len(hidden)} matrices, "
        f"AdamW the other {sizes[False] / 1e6:.4g}e6"
    )


def _matrices(m: ResolvedModel, where: str) -> int:
    """Elements of the matrices that a token is multiplied by, in a block or, as the head, at the end."""
    return sum(
        math.prod(shape_of(row, m)) for row in TABLE if row.where == where and row.kind == "matrix" and row.when(m)
    )


def layer_flops(m: ResolvedModel, seq_len: int) -> float:
    """Forward FLOPs of one block per token; of the s x s scores those count that a causal query sees."""
    window = min(m.sliding_window or seq_len, seq_len)
    seen = window - window * window / (2 * seq_len)
    return 2.0 * _matrices(m, "layer") + 4.0 * seen * sizes(m)["heads"]


def head_flops(m: ResolvedModel) -> float:
    """Forward FLOPs of the output head per token; a tied head is multiplied like any other."""
    return 2.0 * _matrices(m, "last")


def training_flops(m: ResolvedModel, seq_len: int) -> float:
    """FLOPs of forward and backward per token: three times the forward (Narayanan et al. 2021, appendix)."""
    return 3 * (m.num_layers * layer_flops(m, seq_len) + head_flops(m))


def run_flops(config: Resolved) -> float:
    """FLOPs of forward and backward per token of this run: the weight gradient of a frozen matrix is not computed."""
    m, named = config.model, config.shapes
    # an embedding is looked up; tied, it is the head's matrix too
    heads = {row.tied for row in TABLE if row.tied and m.tie_embeddings}
    frozen = sum(
        math.prod(shape)
        for name, shape in named.model.items()
        if name not in named.trained and (row_of(name).kind == "matrix" or name in heads)
    )
    return training_flops(m, config.train.seq_len) - 2 * frozen + 6 * _elements(named.factors)
