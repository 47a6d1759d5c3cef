"""Names and shapes of parameters in Hugging Face's files, by the table of parameters; hf.py moves the values.

No torch here, so that a folder with the wrong weights is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import ResolvedModel
from megalite.config.parameters import Shape, find_row, is_hidden_matrix, row_of, split_layer
from megalite.config.shapes import shapes, sizes


@dataclass(frozen=True)
class Family:
    """What the files of a family have in common.

    `root`: of the module that holds all but the head; `layers`: of a block, before its number. `transposed`: the
    matrices of blocks are [in, out] there.
    """

    root: str
    layers: str
    transposed: bool


# Mistral, Qwen2 and Qwen3 are written as Llama is
FAMILIES = {
    "llama": Family("model.", "model.layers.", transposed=False),
    "gpt2": Family("transformer.", "transformer.h.", transposed=True),
}


def hf_shapes(model: ResolvedModel) -> dict[str, Shape]:
    """Hugging Face's name and shape of every parameter of the model; `lm_head.weight` is left out where it is tied."""
    found: dict[str, Shape] = {}
    size = sizes(model)
    for name, shape in shapes(model).items():
        there, words = names_there(name, model), row_of(name).shape[0].split()
        rows = [size[word] for word in words] if len(there) > 1 else [shape[0]]
        for other, count in zip(there, rows, strict=True):
            part = (count, *shape[1:])
            found[other] = part[::-1] if is_transposed(name, model) else part
    return found


def is_transposed(name: str, model: ResolvedModel) -> bool:
    """Whether the parameter `name` is [out, in] here and [in, out] there."""
    return FAMILIES[model.family].transposed and is_hidden_matrix(name)


def names_there(name: str, model: ResolvedModel) -> list[str]:
    """Hugging Face's names of the tensors that the parameter `name` joins, in its order of rows.

    Raises ValueError if the model's family has none.
    """
    family, row = model.family, find_row(name)
    if row is None or family not in row.hf:
        raise ValueError(f"{name!r} has no counterpart in Hugging Face's Llama, Qwen2, Qwen3 or GPT-2")
    layer, _ = split_layer(name)
    prefix = "" if layer is None else f"{FAMILIES[family].layers}{layer}."
    return [f"{prefix}{module}.{row.leaf}" for module in row.hf[family].split()]
