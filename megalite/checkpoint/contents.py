"""Which tensors a checkpoint must hold, by the configuration it was written with. No torch here.

A manifest's own list of tensors cannot show that one is missing; its configuration can. Reading, verifying and
publishing all call `check_contents`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.checkpoint.manifest import one_line
from megalite.checkpoint.state import state_from
from megalite.config import Config, ConfigError, Resolved, from_mapping
from megalite.config.dtypes import DTYPES
from megalite.config.parameters import Shape
from megalite.config.resolved import complete
from megalite.config.schema import SECTIONS
from megalite.text.tokenizer import load_tokenizer

_MOMENTS, _MOMENTUM = ("exp_avg", "exp_avg_sq"), ("momentum",)


class OtherVersion(ValueError):
    """The checkpoint's configuration has a key that this version does not know."""


def config_of(manifest: Mapping[str, Any]) -> Resolved:
    """The configuration that a checkpoint was written with.

    Raises ValueError if it cannot be read, OtherVersion if it has an unknown key.
    """
    sections = manifest["config"]
    if not all(isinstance(keys, dict) for keys in sections.values()):
        raise ValueError("a section of config is not an object")
    known = {f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)}
    for key in (f"{section}.{key}" for section, keys in sections.items() for key in keys):
        if key not in known:
            raise OtherVersion(f"its configuration has {one_line(key)}, which this megalite does not know")
    try:
        config = from_mapping({name: {k: _text(v) for k, v in keys.items()} for name, keys in sections.items()})
        # an older version did not write every key of the model
        return complete(config, 1)
    except RecursionError:
        raise ValueError("config is nested too deeply") from None


def _text(value: Any) -> Any:
    """A value of a manifest's config as the YAML reader returns it: every scalar is text."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, dict):
        return value
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def check_contents(manifest: Mapping[str, Any]) -> None:
    """Check a manifest's configuration, counters and tensors against each other. Raises ValueError if they disagree.

    A checkpoint may hold weights alone, as converted ones do.
    """
    config, tensors = config_of(manifest), manifest["tensors"]
    state_from(manifest)
    versions = manifest.get("versions", {})
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise ValueError(f"versions is {one_line(repr(versions))}, not names and versions")
    _require_sizes(config, len(tensors))
    kinds = {name.partition(".")[0] for name in tensors}
    weights_only = kinds == {"weight"}
    missing: list[str] = []
    known: set[str] = set()
    for ways, shape, dtype in expected(config, weights_only):
        # a matrix has either AdamW's moments or Muon's momentum
        names = next((way for way in ways if all(name in tensors for name in way)), ways[0])
        known |= set(names)
        for name in names:
            if name not in tensors:
                missing.append(name)
                continue
            found = tensors[name]
            if tuple(found["shape"]) != shape or (dtype and found["dtype"] != dtype):
                want = f"{list(shape)}" + (f" {dtype}" if dtype else "")
                raise ValueError(f"tensor {name} is {found['shape']} {found['dtype']}, its configuration needs {want}")
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(known)} tensors that its configuration needs are missing, among them "
            f"{', '.join(missing[:2])}"
        )
    if unknown := sorted(set(tensors) - known):
        raise ValueError(f"tensor {unknown[0]} does not belong to its configuration")


def expected(config: Resolved, weights_only: bool) -> Iterator[tuple[list[tuple[str, ...]], Shape, str]]:
    """Yield (alternative sets of full names, shape, dtype or "" for any) for everything that a checkpoint stores.

    Every parameter has a weight. A trained one also has the optimizer's tensors, and a master copy if its dtype is
    narrower than fp32.
    """
    t, shapes = config.train, config.shapes
    stored = DTYPES[t.dtype]
    wide = DTYPES[stored.wide].torch
    for name, shape in (shapes.factors if config.tune.mode == "lora" else shapes.model).items():
        yield [(f"weight.{name}",)], shape, "" if weights_only else stored.torch
        if weights_only or name not in shapes.trained:
            continue
        if stored.torch != wide:
            yield [(f"master.{name}",)], shape, wide
        # which matrices Muon updates is up to the optimizer
        ways = [_MOMENTS, _MOMENTUM] if config.optim.name == "muon" and len(shape) == 2 else [_MOMENTS]
        yield [tuple(f"{kind}.{name}" for kind in kinds) for kinds in ways], shape, wide


def _require_sizes(config: Resolved, count: int) -> None:
    """Raise ValueError if a size of the model is not positive, or it has more layers than there are tensors."""
    m = config.model
    for key in ("vocab_size", "hidden_size", "num_layers", "num_heads", "ffn_hidden_size"):
        if getattr(m, key) < 1:
            raise ValueError(f"model.{key} is {getattr(m, key)}, not a size")
    if m.num_layers > count:
        raise ValueError(f"model.num_layers is {m.num_layers}, and there are {count} tensors")


def is_adapter(manifest: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds LoRA factors only."""
    return bool(manifest["config"].get("tune", {}).get("mode") == "lora")


def check_adapter(manifest: Mapping[str, Any], config: Config, folder: Path, resume: bool) -> None:
    """Raise ValueError if a run of `config` cannot use a checkpoint because the two train different parameters.

    `resume`: the checkpoint is the run's own; else it holds the weights that the run starts from.
    """
    mode = config.tune.mode
    if not is_adapter(manifest):
        if resume and mode == "lora":
            raise ValueError(
                f"{folder} holds whole weights, tune.mode=lora writes adapters; start from it in another "
                f"train.run_dir, with checkpoint.load={folder}"
            )
        return
    if mode != "lora":
        raise ValueError(
            f"{folder} holds LoRA factors only, tune.mode={mode} needs whole weights; merge them first, "
            f"or use tune.mode=lora"
        )
    for key in ("lora_rank", "lora_alpha", "lora_targets"):
        saved, asked = manifest["config"]["tune"][key], getattr(config.tune, key)
        if saved != asked:
            raise ValueError(
                f"{folder} holds adapters of tune.{key}={saved}, not {asked}; use tune.{key}={saved} "
                f"or another train.run_dir"
            )


def new_rows(config: Config, known: Sequence[str]) -> range:
    """The token ids that model.add_tokens adds to a model that already has the tokens `known`; empty if it has all.

    Raises ConfigError if a known token would get another id.
    """
    add, tokenizer = config.model.add_tokens, config.data.tokenizer
    if tokenizer is None or set(add) <= set(known):
        return range(0)
    before = load_tokenizer(tokenizer, [token for token in known if token in add])
    after = load_tokenizer(tokenizer, add)
    moved = [token for token, number in before.controls.items() if after.controls.get(token) != number]
    if moved:
        raise ConfigError(
            f"model.add_tokens: {moved[0]} would get another id than in the checkpoint; keep its tokens first: "
            f"{', '.join(known)}"
        )
    return range(before.vocab_size, after.vocab_size)
