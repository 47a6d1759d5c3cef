"""Convert Megatron-LM's legacy checkpoints, iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt, to a run folder.

Names and layouts are those of `--transformer-impl local` (megatron/legacy/model/language_model.py): rows of
query_key_value are [queries, key, value] by kv group, as here, and dense_h_to_4h of SwiGLU is gate, then up, on each
rank.

A .pt file is a pickle. torch opens it with weights_only: tensors, plain containers and argparse.Namespace. Every such
file also contains Megatron-LM's enums and numpy's random states; inert stand-ins replace them.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.dtypes import to_torch
from megalite.config import Config, ConfigError, ResolvedModel, TrainConfig, check, resolve
from megalite.config.dtypes import DTYPES
from megalite.config.shapes import rows_of, shapes
from megalite.exchange.convert import write_run
from megalite.exchange.megatron_args import Described, read_args
from megalite.model.cut_table import shard_of

RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
FILE = "model_optim_rng.pt"
# older Megatron-LM called both norms after LayerNorm, the attention by another name, and the layers a transformer
ALIASES = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}
ALIASES |= {"final_layernorm": "final_norm"}
NUMPY = {
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype"),
}
State = dict[str, Tensor]


class Standin:
    """Replaces an object whose class is not loaded; it keeps the class's name and the arguments."""

    name = ""

    def __init__(self, *args: object) -> None:
        self.made_with = args

    def __setstate__(self, state: object) -> None:
        """Ignore the state, which is not needed."""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.made_with))})"


def from_megatron(source: Path, target: Path, allow_pickle: bool, dtype: str | None = None) -> Path:
    """Write `source`, the folder of an iteration or of a run (its latest iteration), as the new run folder `target`.

    Shards are mapped to memory, and read one parameter at a time. `dtype`: for all weights; None: as stored. Returns
    `target`. Raises ValueError without `allow_pickle`, and for anything missing or not supported.
    """
    iteration = _iteration(source)
    if not allow_pickle:
        raise ValueError(
            f"{iteration}: {FILE} is a pickle, a format that can run code when opened; megalite opens it for tensors "
            f"only, and only if you trust its origin: add --allow-pickle"
        )
    ranks = _ranks(iteration)
    described = {place: read_args(args, iteration) for place, (_, args) in ranks.items()}
    first = described[0, 0]
    for place, other in described.items():
        if other != first or str(ranks[place][1]["iteration"]) != str(ranks[0, 0][1]["iteration"]):
            name = f"mp_rank_{place[0]:02d} of stage {place[1]}"
            raise ValueError(
                f"{iteration}: {name} is of another run or iteration than mp_rank_00; copy the folders of one"
            )
    tp, pp = len({t for t, _ in ranks}), len({p for _, p in ranks})
    expected = first.tp or tp, first.pp or pp
    if set(ranks) != {(t, p) for t in range(tp) for p in range(pp)} or (tp, pp) != expected:
        raise ValueError(
            f"{iteration}: holds {len(ranks)} ranks, not tp {expected[0]} x pp {expected[1]}; copy all mp_rank folders"
        )
    model = _checked(first, iteration)
    found = _collect([[ranks[t, p][0] for t in range(tp)] for p in range(pp)], model, iteration)
    whole = shapes(model)
    if extra := sorted(found.keys() - whole.keys()):
        raise ValueError(f"{iteration}: tensor {extra[0]} does not belong to the model that its arguments describe")
    if missing := [name for name in whole if name not in found]:
        raise ValueError(f"{iteration}: {missing[0]} is missing; copy all mp_rank folders")
    return write_run(
        target,
        model,
        lambda name: _joined(name, found[name], whole[name], model, iteration),
        {name: to_torch(DTYPES[dtype]) if dtype else found[name][0].dtype for name in whole},
        context=first.context,
    )


def _checked(described: Described, iteration: Path) -> ResolvedModel:
    """The model, resolved. Raises ValueError if it cannot run."""
    try:
        config = resolve(Config(model=described.model, train=TrainConfig(seq_len=described.context)), 1)
        check(config, 1)
    except ConfigError as error:
        raise ValueError(f"{iteration}: {error}") from None
    return config.model


def _iteration(source: Path) -> Path:
    pointer = source / "latest_checkpointed_iteration.txt"
    if pointer.is_file():
        word = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if word != "release" and not re.fullmatch(r"\d{1,9}", word):
            raise ValueError(f"{pointer}: holds neither a number nor release; name the iter_NNNNNNN folder")
        return source / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not source.is_dir() or not any(RANK.fullmatch(p.name) or p.suffix == ".distcp" for p in source.iterdir()):
        raise ValueError(f"{source}: has no mp_rank_NN folder; name iter_NNNNNNN, or the folder that contains it")
    return source


def _ranks(iteration: Path) -> dict[tuple[int, int], tuple[list[Any], dict[str, Any]]]:
    """For each (tp, pp) rank, the language models of its virtual stages and the arguments of its run."""
    found: dict[tuple[int, int], tuple[list[Any], dict[str, Any]]] = {}
    for folder in sorted(iteration.iterdir()) if iteration.is_dir() else []:
        if place := RANK.fullmatch(folder.name):
            content = _open(folder / FILE)
            if not isinstance(content, dict) or not isinstance(content.get("args"), argparse.Namespace):
                raise ValueError(f"{folder / FILE}: has no args; it is not a Megatron-LM checkpoint")
            # with virtual stages model0, model1, ...
            parts = ["model"] if "model" in content else [f"model{i}" for i in range(1000) if f"model{i}" in content]
            models = [content[key].get("language_model") for key in parts if isinstance(content[key], dict)]
            if not models or not all(isinstance(model, dict) for model in models):
                raise ValueError(
                    f"{folder / FILE}: has no model.language_model; only Megatron-LM's legacy models are supported "
                    f"(--use-legacy-models); convert others to a Hugging Face folder there"
                )
            version = content.get("checkpoint_version", 3.0)
            if not isinstance(version, int | float) or version not in (2, 3):
                raise ValueError(f"{folder / FILE}: checkpoint_version={version} is not supported; 2.0 and 3.0 are")
            args = {str(key): value for key, value in vars(content["args"]).items()}
            args["iteration"] = content.get("iteration")
            if found.setdefault((int(place[1]), int(place[2] or 0)), (models, args))[1] is not args:
                raise ValueError(f"{folder}: another folder has the same rank; keep the folders of one run")
    if any(iteration.glob("*.distcp")) or (iteration / "metadata.json").is_file():
        raise ValueError(
            f"{iteration}: a distributed checkpoint of megatron-core, which is not supported; convert it to a Hugging "
            f"Face folder there, and that one with --from hf"
        )
    if (0, 0) not in found:
        raise ValueError(f"{iteration}: has no mp_rank_00 folder; name iter_NNNNNNN, or the folder that contains it")
    return found


def _open(path: Path) -> Any:
    """The content of a .pt file, its tensors mapped to memory. Runs no code from it.

    Raises ValueError if the file is damaged or contains another class.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        allowed: list[Any] = [argparse.Namespace]
        refused = []
        for name in names:
            if name.startswith("megatron.") or name in NUMPY:
                allowed.append((type("Standin", (Standin,), {"name": name}), name))
            elif name == "builtins.getattr":
                # Python 3.11.0 to 3.11.3 pickle a member of an enum this way
                allowed.append((_member, name))
            elif name != "argparse.Namespace":
                refused.append(name)
        if not refused:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch raises exceptions of many types for a damaged or hostile file
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: not a Megatron-LM checkpoint ({type(error).__name__} {reason}); copy it again"
        ) from None
    raise ValueError(
        f"{path}: contains {', '.join(sorted(refused)[:3])}, which is not opened: only tensors, plain containers, "
        f"argparse.Namespace and Megatron-LM's enums are; save it again in Megatron-LM without that"
    )


def _member(owner: object, name: object) -> Standin:
    """getattr, of an enum's stand-in only."""
    if not (isinstance(owner, type) and issubclass(owner, Standin) and isinstance(name, str)):
        raise pickle.UnpicklingError("getattr of something that is not an enum")
    return owner(name)


def _collect(stages: list[list[list[Any]]], model: ResolvedModel, where: Path) -> dict[str, list[Tensor]]:
    """For each parameter, its shards over tp. `stages[p][t]`: the virtual stages of pp rank p, tp rank t.

    Layers are numbered within a virtual stage. Chunk v of all stages precedes chunk v + 1. The number of layers is
    counted: the first and last stages may have fewer than the others.
    """
    found: dict[str, list[Tensor]] = {}
    first = 0
    for chunk in range(max(len(models) for stage in stages for models in stage)):
        for stage in stages:
            if any(len(models) != len(stages[0][0]) for models in stage):
                raise ValueError(
                    f"{where}: its ranks have different numbers of virtual stages; copy all mp_rank folders"
                )
            shards = [_renamed(models[chunk], first, model, where) for models in stage]
            if any(shard.keys() != shards[0].keys() for shard in shards):
                raise ValueError(f"{where}: its tp ranks have different tensors; copy all mp_rank folders of one run")
            for name in shards[0]:
                found.setdefault(name, [shard[name] for shard in shards])
            layers = [int(name.split(".")[1]) for name in shards[0] if name.startswith("layers.")]
            first = max(layers, default=first - 1) + 1
    return found


def _renamed(language_model: Any, first_layer: int, model: ResolvedModel, where: Path) -> State:
    """The tensors of one virtual stage of a tp rank, by megalite's names."""
    there = {row.megatron: row.module for row in rows_of(model) if row.megatron}
    state: dict[str, Any] = {}
    for part, inside in language_model.items():
        for key, value in inside.items() if isinstance(inside, dict) else ():
            module, _, leaf = str(key).rpartition(".")
            for old, new in ALIASES.items():
                module = module.replace(old, new)
            module = re.sub(r"^(layers\.\d+\.)attention\.", r"\1self_attention.", module)
            layer = re.fullmatch(r"layers\.(\d{1,5})\.(.+)", module)
            if leaf == "_extra_state" or str(key).endswith("rotary_emb.inv_freq"):
                continue
            if part == "embedding" and isinstance(value, dict):
                here = there.get(f"{part}.{key}", str(key))
                state |= {f"{here}.{end}": tensor for end, tensor in value.items()}
            elif part in ("encoder", "transformer") and layer and layer[2] in there:
                state[f"layers.{int(layer[1]) + first_layer}.{there[layer[2]]}.{leaf}"] = value
            else:
                place = f"{'encoder' if part == 'transformer' else part}.{module}".rstrip(".")
                state[f"{there[place]}.{leaf}" if place in there else f"{part}.{key}"] = value
    for name, value in state.items():
        if (
            not isinstance(value, Tensor)
            or value.dtype not in map(to_torch, DTYPES.values())
            or value.layout != torch.strided
        ):
            raise ValueError(f"{where}: {name} is not a dense tensor of {', '.join(DTYPES)}; it is not supported")
    return state


def _joined(name: str, shards: list[Tensor], shape: tuple[int, ...], model: ResolvedModel, where: Path) -> Tensor:
    """Join the tp shards of a parameter, without the vocabulary's padding."""
    if name in ("embed.weight", "loss_head.head.weight"):
        if any(shard.dim() != 2 or shard.shape != shards[0].shape for shard in shards):
            raise ValueError(f"{where}: {name} has different shapes on its tp ranks; copy one run's folders")
        rows = torch.cat(shards)
        if rows.shape[0] < shape[0] or rows.shape[1:] != shape[1:]:
            raise ValueError(f"{where}: {name} is {list(rows.shape)}, the arguments of the run say {list(shape)}")
        return rows[: shape[0]].clone()
    whole = torch.empty(shape, dtype=shards[0].dtype)
    for rank, local in enumerate(shards):
        shard = shard_of(name, shape, model, len(shards), rank)
        if tuple(local.shape) != shard.local_shape:
            raise ValueError(f"{where}: {name} of tp rank {rank} is {list(local.shape)}, not {list(shard.local_shape)}")
        if shard.local_shape == shape and rank and not torch.equal(local, whole):
            raise ValueError(
                f"{where}: {name} differs between tp ranks, which should hold copies; copy one run's folders"
            )
        shard.put(local, whole)
    return whole
