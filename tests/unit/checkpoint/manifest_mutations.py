"""Random changes of a manifest, with its digest corrected or not, and the list of all changes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import (
    KINDS,
    NASTY,
    Mutation,
    Random,
    a_pickle,
    add_file,
    cut,
    deep_nesting,
    duplicate_keys,
    empty,
    flip_a_bit,
    grow,
    header_entry,
    header_keys,
    header_length,
    header_metadata,
    link_file,
    link_folder,
    no_plain_file,
    remove_file,
    rename_folder,
    rewrite,
    swap_files,
    swap_two_runs,
    zero_a_run,
)

from megalite.checkpoint.manifest import digest


def change_manifest(change: Callable[[Random, dict[str, Any]], str], sign: bool) -> Mutation:
    """A change of the manifest; `sign`: by a forger, who corrects its digest."""

    def mutate(rng: Random, folder: Path) -> str:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        said = change(rng, manifest)
        if sign:
            manifest["digest"] = digest(manifest)
        rewrite(path, json.dumps(manifest).encode())
        return said

    mutate.__name__ = change.__name__ + ("_signed" if sign else "")
    return mutate


def any_value(rng: Random, manifest: dict[str, Any], top: str = "") -> str:
    """Another value, key, order or number of items at a random place."""
    place: Any = manifest
    key: Any = top or rng.choice(sorted(manifest))
    path = [key]
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        path.append(key)
    where = ".".join(map(str, path))
    way = rng.choice(["nasty", "nasty", "delete", "near", "rename", "double"])
    if way == "delete":
        del place[key]
    elif way == "near" and type(place[key]) is int:
        place[key] += rng.choice([-8, -1, 1, 8, 10**18])
    elif way == "rename" and isinstance(place, dict):
        place[rng.choice(["../up", "/abs", "x" * 5000, "a\nb", "\ud800", "weight.other"])] = place.pop(key)
    elif way == "double" and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    else:
        place[key] = copy.deepcopy(rng.choice(NASTY))
    return f"{way} {where}"


def any_tensor_value(rng: Random, manifest: dict[str, Any]) -> str:
    return any_value(rng, manifest, rng.choice(["tensors", "files"]))


def swap_in_blocks(rng: Random, manifest: dict[str, Any]) -> str:
    """Two blocks, or a field of each, change places."""
    blocks = [(name, b) for name, tensor in manifest["tensors"].items() for b in tensor["blocks"]]
    (m, a), (n, b) = rng.sample(blocks, 2)
    fields = rng.choice([["file"], ["key"], ["start"], ["size"], ["sha256"], ["file", "key", "sha256"], list(a)])
    for field in fields:
        a[field], b[field] = b[field], a[field]
    return f"{m} {n} {fields}"


def swap_tensors(rng: Random, manifest: dict[str, Any]) -> str:
    a, b = rng.sample(sorted(manifest["tensors"]), 2)
    manifest["tensors"][a], manifest["tensors"][b] = manifest["tensors"][b], manifest["tensors"][a]
    return f"{a} {b}"


def huge_tensor(rng: Random, manifest: dict[str, Any]) -> str:
    """A tensor of up to 10^18 elements that agrees with itself, in a file that is said to be as large."""
    name = rng.choice(sorted(manifest["tensors"]))
    rows = rng.choice([10**7, 10**10, 10**17])
    tensor = manifest["tensors"][name]
    block = tensor["blocks"][0]
    tensor["shape"], tensor["blocks"] = [rows, 8], [block]
    block.update(start=[0, 0], size=[rows, 8], key=f"{name}[0:{rows},0:8]")
    if rng.random() < 0.5:
        manifest["files"][block["file"]] = 10**20
    return f"{name} {rows}"


def nest_config(rng: Random, manifest: dict[str, Any]) -> str:
    deep: Any = 1
    for _ in range(rng.choice([50, 400])):
        deep = [deep]
    manifest["config"]["model"]["deep"] = deep
    return "config"


def drop_tensors(rng: Random, manifest: dict[str, Any]) -> str:
    """One tensor, one parameter, one layer, one kind or all that a rank has written is not listed."""
    tensors = manifest["tensors"]
    name = rng.choice(sorted(tensors))
    _, _, parameter = name.partition(".")
    way = rng.choice(["tensor", "parameter", "layer", "kind", "rank"])
    gone = {
        "tensor": lambda n: n == name,
        "parameter": lambda n: n.endswith(f".{parameter}"),
        "layer": lambda n: ".layers.1." in n,
        "kind": lambda n: n.startswith(f"{rng.choice(KINDS[:1])}."),
        "rank": lambda n: any(block["file"].startswith("rank-00001") for block in tensors[n]["blocks"]),
    }[way]
    for each in [n for n in tensors if gone(n)]:
        del tensors[each]
    return f"{way} {name}"


def half_of_a_tensor(rng: Random, manifest: dict[str, Any]) -> str:
    """What one rank holds of a tensor is all there is said to be, in a shape that agrees."""
    name = rng.choice(sorted(n for n, t in manifest["tensors"].items() if len(t["blocks"]) > 1))
    tensor = manifest["tensors"][name]
    tensor["blocks"] = tensor["blocks"][:1]
    tensor["shape"] = list(tensor["blocks"][0]["size"])
    return name


COUNTERS: dict[str, tuple[Any, ...]] = {
    "step": (-1, 10**30, True, 3.0, None),
    "consumed_samples": (-1, 0, 2, 10**16, 10**30, 10**300, 24.0, "24"),
    "skipped_steps": (-1, 9, 10**30, None),
    "scale_steps": (-1, 9, 10**30, 0.5),
    "loss_scale": (1e308, 1e39, 10**400, float("inf"), float("nan"), 0, 0.0, -2.0, None, "1", True),
    "best_loss": (float("nan"), float("inf"), -float("inf"), 10**400, "x", [], True),
    "evals_without_gain": (-1, 9, 10**30, None),
    "data": (None, 7, ["corpus"]),
    "base": (None, 7, "here", "0123 /runs/a", "/runs/a"),
    "versions": (None, 7, ["torch"], {"torch": 2}),
}


def nonsense_counter(rng: Random, manifest: dict[str, Any]) -> str:
    key = rng.choice(sorted(COUNTERS))
    manifest[key] = rng.choice(COUNTERS[key])
    return f"{key} = {manifest[key]!r:.40}"


def other_configuration(rng: Random, manifest: dict[str, Any]) -> str:
    """A configuration that needs other tensors than there are, or that cannot be read."""
    section, key, value = rng.choice(
        [
            ("model", "num_layers", rng.choice([0, 1, 3, 10**9, 10**30, -2])),
            ("model", "hidden_size", rng.choice([0, 4, 16, -8, 10**18])),
            ("model", "num_heads", 0),
            ("model", "tie_embeddings", False),
            ("model", "qkv_bias", True),
            ("model", "norm", rng.choice(["layernorm", "batchnorm", 5, None])),
            ("model", "activation", "gelu"),
            ("train", "dtype", rng.choice(["bf16", "fp64", "int8"])),
            ("optim", "name", rng.choice(["sgd", None, 3])),
            ("optim", "lr", rng.choice(["fast", float("nan"), []])),
            ("tune", "mode", "lora"),
            ("tune", "freeze", rng.choice(["embed.*", "nothing.*", "*"])),
            ("parallel", "unheard_of", 1),
            ("unheard_of", "key", 1),
        ]
    )
    manifest["config"].setdefault(section, {})[key] = value
    return f"{section}.{key} = {value!r:.40}"


def no_section(rng: Random, manifest: dict[str, Any]) -> str:
    section = rng.choice(sorted(manifest["config"]))
    manifest["config"][section] = rng.choice([None, 1, "x", [], [1]])
    return section


CHANGES = (any_value, any_tensor_value, any_tensor_value, swap_in_blocks, swap_tensors, huge_tensor, nest_config)


NEVER_BELIEVED = (drop_tensors, half_of_a_tensor, nonsense_counter, other_configuration, no_section)


MUTATIONS: tuple[Mutation, ...] = (
    *(flip_a_bit, zero_a_run, cut, grow, empty, swap_two_runs, deep_nesting, swap_files, remove_file, add_file),
    *(link_file, link_folder, no_plain_file, rename_folder, a_pickle, duplicate_keys),
    *(header_entry, header_keys, header_metadata, header_length),
    *(change_manifest(change, sign) for change in (*CHANGES, *NEVER_BELIEVED) for sign in (False, True)),
)
