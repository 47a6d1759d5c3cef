"""Shapes of a model's parameters, whole and on one tensor-parallel rank, by the table of parameters. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config.model import ResolvedModel
from megalite.config.parameters import TABLE, Row, Shape


@dataclass(frozen=True)
class Projection:
    """A part of a linear to which LoRA gives factors of its own: `rows` outputs of `columns` inputs.

    `there`: its name in Hugging Face's files, without the path.
    """

    name: str
    there: str
    rows: int
    columns: int


def rows_of(m: ResolvedModel) -> list[Row]:
    """The rows of the table that a model has, in order; a tied head has none."""
    return [row for row in TABLE if row.when(m) and not (row.tied and m.tie_embeddings)]


def sizes(m: ResolvedModel, tp: int = 1) -> dict[str, int]:
    """What the words of a row's shape stand for; with `tp` the share of one rank where that dimension is cut."""
    return {
        "vocab": -(-m.vocab_size // tp),  # padded
        "positions": m.learned_positions,
        "hidden": m.hidden_size,
        "ffn": m.ffn_hidden_size // tp,
        "head": m.head_dim,
        "heads": m.num_heads // tp * m.head_dim,
        "kv": m.num_kv_heads // min(tp, m.num_kv_heads) * m.head_dim,  # at least one group, if need be as a replica
    }


def shape_of(row: Row, m: ResolvedModel, **more: int) -> Shape:
    """The whole shape of a parameter; `more`: sizes that the model does not have, as the rank of factors."""
    of = sizes(m) | more
    return tuple(sum(of[word] for word in words.split()) for words in row.shape)


def local_shape(row: Row, m: ResolvedModel, tp: int, **more: int) -> Shape:
    """The shape of what each of `tp` ranks holds, padding and replicas counted."""
    cut = {"": None, "row": 1}.get(row.cut, 0)
    whole, local = sizes(m) | more, sizes(m, tp)
    return tuple(
        sum((local if dim == cut else whole)[word] for word in words.split()) for dim, words in enumerate(row.shape)
    )


def shapes(m: ResolvedModel) -> dict[str, Shape]:
    """The shape of every parameter of the whole model by its name; a tied head has none of its own."""
    rows = [(row, shape_of(row, m)) for row in rows_of(m)]
    found = {row.name: shape for row, shape in rows if row.where == "first"}
    layer = {row.name: shape for row, shape in rows if row.where == "layer"}
    found |= {f"layers.{i}.{name}": shape for i in range(m.num_layers) for name, shape in layer.items()}
    return found | {row.name: shape for row, shape in rows if row.where == "last"}


def projections(m: ResolvedModel) -> dict[str, tuple[Projection, ...]]:
    """The linears of a block, each with the projections whose rows it holds, in their order.

    A family that keeps several of them in one matrix has one projection, as GPT-2's c_attn.
    """
    of, found, family = sizes(m), {}, m.family
    for row in rows_of(m):
        if row.projections:
            modules = row.hf[family] if family in row.hf else row.targets[family]
            there = [module.rpartition(".")[2] for module in modules.split()]
            words, names = row.shape[0].split(), list(row.projections)
            if len(there) < len(names):
                words, names = [row.shape[0]], ["".join(names)]
            found[row.module] = tuple(
                Projection(name, other, sum(of[size] for size in sum_of.split()), of[row.shape[1]])
                for name, other, sum_of in zip(names, there, words, strict=True)
            )
    return found
