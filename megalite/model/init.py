"""Initial weights that no layout changes: each parameter is drawn whole, from a generator seeded by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalite.config import ModelConfig
from megalite.model.cut_table import ADAPTER, global_name, shard_of
from megalite.model.decoder import Decoder
from megalite.parallel.cuts import Shard
from megalite.parallel.groups import Group

RESIDUAL_OUTPUTS = ("attn.out.weight", "mlp.down.weight")


def draw(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The whole initial value of a parameter, fp32 on the CPU.

    Norms are 1, biases 0, matrices normal(0, init_std); what is added to the residual stream is scaled by
    1 / sqrt(2 num_layers) with the depth of the whole model (Radford et al. 2019, section 2.3). Of LoRA's factors a is
    uniform(±1 / sqrt(in)), as peft draws it, and b is 0 (Hu et al. 2021, section 4.1).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    factor = ADAPTER.fullmatch(name)
    if name.endswith(".bias") or (factor is not None and factor[4] == "b"):
        return torch.zeros(shape)
    std = model.init_std
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= (2 * model.num_layers) ** 0.5
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if factor:
        bound = shape[1] ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def materialise(
    decoder: Decoder,
    model: ModelConfig,
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
