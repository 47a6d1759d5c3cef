"""Write a Hugging Face folder by tensor: safetensors files, their index, config.json, tokenizer and other files.

The folder appears when it is complete. At most one parameter is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.dtypes import from_torch
from megalite.checkpoint.publish import new_folder
from megalite.checkpoint.safetensors_file import make_header
from megalite.config import ModelConfig, ResolvedModel
from megalite.config.shapes import shapes
from megalite.exchange.hf_config import TRAINING, read_model, write_model
from megalite.exchange.hf_fields import read_json
from megalite.exchange.hf_folder import INDEX, SINGLE, carry, require_new
from megalite.exchange.hf_tokenizer import write_tokenizer
from megalite.model.layouts import to_hf
from megalite.model.names import hf_shapes, names_there
from megalite.text.chat import ChatTemplate, find_template, turn_ends
from megalite.text.tokenizer import load_tokenizer
from megalite.text.tokenizer_files import TEMPLATE, TEMPLATES


def export(
    target: Path,
    model: ResolvedModel,
    get: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    *,
    context: int,
    carried: Path | None = None,
    tokenizer: Path | None = None,
    template: Path | None = None,
    shard_bytes: int = 2 * 10**9,
) -> Path:
    """Write the model whose parameter `name` is `get(name)`, of dtype `dtypes[name]`, to the new folder `target`.

    `carried`: a folder with the model's config.json and other files to copy; None: they are written from `tokenizer`
    and `context` (tokens). `template`: a chat template to use instead of the carried one. `shard_bytes`: at most, per
    file. Returns `target`. Raises ValueError if no Hugging Face family is like the model.
    """
    require_new(target, "target")
    config = _config_json(model, context, carried)
    with new_folder(target) as building:
        if carried is not None:
            carry(carried, building)
        if tokenizer is not None and (carried is None or model.add_tokens):
            config |= write_tokenizer(tokenizer, building, model_type=config["model_type"])
        if template is not None:
            _put_template(template, building)
            _name_turn_end(building, config)
        spelled = "dtype" if "dtype" in config else "torch_dtype"
        config[spelled] = from_torch(next(iter(dtypes.values()))).torch
        _write_json(building / "config.json", config)
        there = {other: dtypes[name] for name in shapes(model) for other in names_there(name, model)}
        _write_weights(building, model, get, there, shard_bytes)
    return target


def _config_json(model: ResolvedModel, context: int, carried: Path | None) -> dict[str, Any]:
    if carried is None or not (carried / "config.json").is_file():
        return write_model(model, context)
    path = carried / "config.json"
    config = read_json(path)
    there = read_model(config, str(path))
    if model.add_tokens:
        config["vocab_size"] = model.vocab_size
        there = dataclasses.replace(there, vocab_size=model.vocab_size)
    if wrong := differing(model, there):
        key = wrong[0]
        raise ValueError(
            f"{path}: model.{key} is {getattr(there, key)} there and {getattr(model, key)} in the checkpoint; "
            f"remove the file, and config.json is written anew"
        )
    return config


def differing(a: ResolvedModel, b: ResolvedModel) -> list[str]:
    """The keys in which two models differ, except those that do not change the computation."""
    ignored = TRAINING | {"from_hf", "add_tokens"}
    return [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.name not in ignored and getattr(a, f.name) != getattr(b, f.name)
    ]


def _put_template(template: Path, folder: Path) -> None:
    """Replace all chat templates of the folder by the run's, unless they are equal."""
    there = folder / TEMPLATE
    if not (there.is_file() and there.read_bytes() == template.read_bytes()):
        shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
        shutil.copyfile(template, there)


def _name_turn_end(folder: Path, config: Mapping[str, Any]) -> None:
    """Add the token that ends a turn to generation_config.json, so that transformers' generate stops at it."""
    try:
        tokenizer = load_tokenizer(folder)
        ends = turn_ends(ChatTemplate(*find_template(None, tokenizer), tokenizer), tokenizer)
    except ValueError:
        return  # no tokenizer, or a template that does not render such a conversation
    path = folder / "generation_config.json"
    kept = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = read_json(path) if path.is_file() else {key: config.get(key) for key in kept}
    eos = found.get("eos_token_id")
    named = eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else []
    if missing := sorted(ends - set(named)):
        _write_json(path, found | {"eos_token_id": [*named, *missing]})


def _write_weights(
    folder: Path,
    model: ResolvedModel,
    get: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    shard_bytes: int,
) -> None:
    """Write the tensors in megalite's order, in one or more files; no parameter is split between files."""
    hf = hf_shapes(model)
    shards: list[list[str]] = [[]]
    filled = 0
    for name in shapes(model):
        size = sum(from_torch(dtypes[there]).bytes * math.prod(hf[there]) for there in names_there(name, model))
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        keys = [there for name in names for there in names_there(name, model)]
        with open(folder / file, "wb") as stream:
            header, size = make_header({key: (from_torch(dtypes[key]), hf[key]) for key in keys})
            stream.write(header)
            total += size
            for name in names:
                for values in to_hf(name, get(name), model).values():
                    stream.write(values.contiguous().view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(keys, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
