"""Initial weights that no layout changes: each parameter is drawn whole, from a generator seeded by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalite.config import ResolvedModel
from megalite.config.parameters import global_name, row_of
from megalite.model.cut_table import shard_of
from megalite.model.decoder import Decoder
from megalite.parallel.cuts import Shard
from megalite.parallel.groups import Group


def draw(name: str, shape: tuple[int, ...], model: ResolvedModel, seed: int) -> Tensor:
    """The whole initial value of a parameter, fp32 on the CPU, by the column `init` of the table of parameters.

    Residual outputs are scaled by 1 / sqrt(2 num_layers) with the depth of the whole model (Radford et al. 2019,
    section 2.3). Of LoRA's factors a is uniform(±1 / sqrt(in)), as peft draws it, and b is 0 (Hu et al. 2021, section
    4.1). Raises KeyError if the table lacks the parameter.
    """
    init = row_of(name).init
    if init in ("ones", "zeros"):
        return torch.ones(shape) if init == "ones" else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if init == "uniform":
        bound = shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = model.init_std / ((2 * model.num_layers) ** 0.5 if init == "residual" else 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def materialise(
    decoder: Decoder,
    model: ResolvedModel,
    group: Group,
    value: Callable[[str, tuple[int, ...]], Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Shard]:
    """Give a decoder built on meta (and cut) its real local weights, `value(global name, whole shape)` cut.

    Returns the shard of every parameter by its name in the module; tied weights stay one Parameter.
    """
    shards: dict[str, Shard] = {}
    real: dict[int, nn.Parameter] = {}
    for name, parameter in list(decoder.named_parameters(remove_duplicate=False)):
        if id(parameter) not in real:
            key = global_name(name, model.tie_embeddings)
            shards[name] = shard_of(key, tuple(parameter.shape), model, group.size, group.rank)
            local = shards[name].cut(value(key, tuple(parameter.shape)))
            real[id(parameter)] = nn.Parameter(local.to(device=device, dtype=dtype))
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, real[id(parameter)])
    return shards
