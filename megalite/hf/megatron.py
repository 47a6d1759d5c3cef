"""Megatron-LM's old checkpoints as a run folder: iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt, of Llama's kind.

A .pt file is a pickle, and is opened for its tensors alone (torch.load with weights_only). Names and layouts are those
of Megatron-LM's `--transformer-impl local` (megatron/legacy/model/language_model.py): rows of query_key_value are
[queries, key, value] by kv group, as here, and dense_h_to_4h of SwiGLU is gate, then up, on each rank.
"""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.hf.convert import DTYPES, write_run
from megalite.model.cut_table import shard_of
from megalite.model.names import global_shapes

RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
LAYER = {
    "attn_norm": "input_norm",
    "attn.qkv": "self_attention.query_key_value",
    "attn.out": "self_attention.dense",
    "mlp_norm": "post_attention_norm",
    "mlp.gate_up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
# older Megatron-LM called both norms after LayerNorm, and the layers a transformer
ALIASES = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}
ALIASES |= {"final_layernorm": "final_norm"}
State = dict[str, Tensor]


def from_megatron(source: Path, target: Path, allow_pickle: bool, dtype: str | None = None) -> Path:
    """Write the new run folder `target` of the folder `source`, of one iteration or of a run (its latest).

    Shards are mapped, and read as parameters are joined of them. ValueError without `allow_pickle`, and for what is
    missing or not Llama's kind.
    """
    iteration = _iteration(source)
    if not allow_pickle:
        raise ValueError(
            f"{iteration}: model_optim_rng.pt is a pickle, a format that can run code as it is opened; megalite opens "
            f"it for tensors alone, and only where you say that you trust its origin: add --allow-pickle"
        )
    ranks, args = _load(iteration)
    model = _model(args, iteration)
    tp, pp = len({t for t, _ in ranks}), len({p for _, p in ranks})
    if len(ranks) != tp * pp or (tp, pp) != (args.get("tensor_model_parallel_size", tp), args.get(
        "pipeline_model_parallel_size", pp)):  # fmt: skip
        raise ValueError(f"{iteration}: holds {len(ranks)} ranks, not tp {tp} x pp {pp}; copy all mp_rank folders")
    stages = [_renamed([ranks[t, p] for t in range(tp)], p * model.num_layers // pp) for p in range(pp)]
    shapes = global_shapes(model)
    found: dict[str, list[Tensor]] = {}
    for shards in stages:
        for name in shards[0]:
            found.setdefault(name, [shard[name] for shard in shards])
    if extra := sorted(found.keys() - shapes.keys()):
        raise ValueError(f"{iteration}: {extra[0]} is not of a Llama model; megalite reads Llama's kind only")
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(f"{iteration}: {missing[0]} is missing; copy all mp_rank folders")
    return write_run(
        target,
        model,
        lambda name: _joined(name, found[name], shapes[name], model, iteration),
        {name: DTYPES[dtype] if dtype else found[name][0].dtype for name in shapes},
        context=args.get("max_position_embeddings") or args.get("seq_length") or 2048,
    )


def _iteration(source: Path) -> Path:
    pointer = source / "latest_checkpointed_iteration.txt"
    if pointer.is_file():
        word = pointer.read_text(encoding="utf-8").strip()
        return source / ("release" if word == "release" else f"iter_{int(word):07d}" if word.isdigit() else "iter_?")
    if not source.is_dir() or not any(RANK.fullmatch(p.name) for p in source.iterdir()):
        raise ValueError(f"{source}: holds no mp_rank_NN folder; name iter_NNNNNNN, or the folder it lies in")
    return source


def _load(iteration: Path) -> tuple[dict[tuple[int, int], Any], dict[str, Any]]:
    """The language model of each (tp, pp) rank, and the arguments of the run that wrote it."""
    ranks, args = {}, {}
    for folder in sorted(iteration.iterdir()) if iteration.is_dir() else []:
        if place := RANK.fullmatch(folder.name):
            path = folder / "model_optim_rng.pt"
            try:
                # Namespace is plain data: without it the arguments of the run could not be read
                with torch.serialization.safe_globals([argparse.Namespace]):
                    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                ranks[int(place[1]), int(place[2] or 0)] = content["model"]["language_model"]
                args = vars(content["args"])
            except pickle.UnpicklingError as error:
                refused = re.search(r"GLOBAL (\S+)", str(error))
                raise ValueError(
                    f"{path}: holds {refused[1] if refused else 'objects'} beside tensors and argparse.Namespace, "
                    f"which is not opened; in Megatron-LM save it again with --no-save-optim --no-save-rng"
                ) from None
            except (OSError, RuntimeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not a Megatron-LM checkpoint ({type(error).__name__} {error})") from None
    if not ranks:
        raise ValueError(f"{iteration}: holds no mp_rank_NN folder; name iter_NNNNNNN, or the folder it lies in")
    return ranks, args


def _model(args: dict[str, Any], where: Path) -> ModelConfig:
    wanted = {
        "swiglu": True,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "num_experts": None,
        "qk_layernorm": False,
        "rotary_percent": 1.0,
        "virtual_pipeline_model_parallel_size": None,
    }
    for key, value in wanted.items():
        if args.get(key, value) != value:
            raise ValueError(
                f"{where}: args.{key}={args[key]} is not built; megalite reads Llama's kind, {key}={value}"
            )
    try:
        heads, hidden = args["num_attention_heads"], args["hidden_size"]
        grouped = args.get("group_query_attention") and args.get("num_query_groups")
        return ModelConfig(
            # the stored rows are padded for tp; without the true number they all count
            vocab_size=args.get("vocab_size") or args["padded_vocab_size"],
            hidden_size=hidden,
            num_layers=args["num_layers"],
            num_heads=heads,
            num_kv_heads=grouped or heads,
            head_dim=args.get("kv_channels") or hidden // heads,
            ffn_hidden_size=args["ffn_hidden_size"],
            norm_eps=args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
            rope_theta=float(args.get("rotary_base") or 10000),
            tie_embeddings=not args.get("untie_embeddings_and_output_weights", False),
            qkv_bias=bool(args.get("add_qkv_bias", False)),
        )
    except KeyError as error:
        raise ValueError(
            f"{where}: the arguments of the run do not name {error}; it is of another Megatron-LM"
        ) from None


def _renamed(ranks: list[Any], first_layer: int) -> list[State]:
    """The tensors of the tp ranks of a stage by megalite's names."""
    there = {other: here for here, other in LAYER.items()}
    found: list[State] = []
    for language_model in ranks:
        state: State = {}
        if "embedding" in language_model:
            state["embed.weight"] = language_model["embedding"]["word_embeddings"]["weight"]
        if "output_layer" in language_model:
            state["loss_head.head.weight"] = language_model["output_layer"]["weight"]
        for key, tensor in (language_model.get("encoder") or language_model.get("transformer")).items():
            module, _, leaf = key.rpartition(".")
            for old, new in ALIASES.items():
                module = module.replace(old, new)
            if leaf == "_extra_state" or key.endswith("rotary_emb.inv_freq"):
                continue
            if module == "final_norm":
                state[f"loss_head.norm.{leaf}"] = tensor
            elif (layer := re.fullmatch(r"layers\.(\d+)\.(.+)", module)) and layer[2] in there:
                state[f"layers.{int(layer[1]) + first_layer}.{there[layer[2]]}.{leaf}"] = tensor
            else:
                state[key] = tensor
        found.append(state)
    return found


def _joined(name: str, shards: list[Tensor], shape: tuple[int, ...], model: ModelConfig, where: Path) -> Tensor:
    """A whole parameter of its tp shards; the vocabulary's padding is left out."""
    if name in ("embed.weight", "loss_head.head.weight"):
        rows = torch.cat(shards)
        if rows.shape[0] < shape[0] or rows.shape[1:] != shape[1:]:
            raise ValueError(f"{where}: {name} is {list(rows.shape)}, the arguments of the run say {list(shape)}")
        return rows[: shape[0]].clone()
    whole = torch.empty(shape, dtype=shards[0].dtype)
    for rank, local in enumerate(shards):
        shard = shard_of(name, shape, model, len(shards), rank)
        if tuple(local.shape) != shard.local_shape:
            raise ValueError(f"{where}: {name} of tp rank {rank} is {list(local.shape)}, not {list(shard.local_shape)}")
        shard.put(local, whole)
    return whole
