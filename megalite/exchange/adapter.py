"""Merge an adapter into a run folder of whole weights; convert one to Hugging Face's peft format, and back.

peft's format is adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.contents import config_of
from megalite.checkpoint.folder import find, read_manifest, step_folder
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.publish import new_folder
from megalite.checkpoint.save import write_whole
from megalite.checkpoint.state import State
from megalite.config import Config, Resolved, TrainConfig, resolve, to_yaml
from megalite.config.shapes import projections, shapes
from megalite.config.trained import adapted
from megalite.config.values import shown
from megalite.exchange.adapter_config import FILE, read_settings, require_targets, tune_config
from megalite.exchange.base import is_hf, name_of
from megalite.exchange.convert import keep_files, write_run
from megalite.exchange.hf_folder import open_folder, read_tensors, require_new
from megalite.exchange.merge import find_adapter, open_merged
from megalite.model.names import FAMILIES, names_there

PREFIX = "base_model.model."


def merge_adapter(adapter: Path, target: Path, base: Path | None = None) -> Path:
    """Write a LoRA run's merged weights as the new run folder `target`, at step 0. `base` as in `open_merged`."""
    config, get, dtype_of = open_merged(adapter, base)
    run_dir = find_adapter(adapter).parents[1]
    dtypes = {name: dtype_of(name) for name in shapes(config.model)}
    hf, files = _model_files(run_dir)
    return write_run(target, config.model, get, dtypes, context=config.train.seq_len, hf=hf, files=files)


def export_peft(adapter: Path, target: Path, base_name: str | None = None) -> Path:
    """Write a LoRA checkpoint's factors to the new folder `target`, for PeftModel.from_pretrained. Returns `target`.

    `base_name`: name or folder of the Hugging Face model that peft loads them onto; None: the adapter's base, if that
    is a Hugging Face folder. Factors of q, k and v are separate in both formats, so only rows of GPT-2's c_attn move.
    """
    folder = find_adapter(adapter)
    require_new(target, "target")
    manifest = read_manifest(folder)
    config = config_of(manifest)
    if base_name is None:
        place = manifest["base"].partition(" ")[2]
        base_name = place if is_hf(Path(place)) else ""
    tensors = {}
    for ours, theirs in _peft_names(config).items():
        factor = read_tensor(folder, manifest, f"weight.{ours}")
        tensors[theirs] = factor[_fused_rows(config)] if ours.endswith(".lora_qkv.b") else factor
    modules = sorted({_module_of(name) for name in tensors})
    ends = {".".join(name.split(".")[-2:]) for name in modules}
    everywhere = len(modules) == len(ends) * config.model.num_layers
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.tune.lora_rank,
        "lora_alpha": config.tune.lora_alpha,
        "lora_dropout": config.tune.lora_dropout,
        "target_modules": sorted(ends) if everywhere else modules,
        "fan_in_fan_out": FAMILIES[config.model.family].transposed,
        "bias": "none",
        "inference_mode": True,
    }
    with new_folder(target) as building:
        save_file(tensors, building / "adapter_model.safetensors", metadata={"format": "pt"})
        (building / FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return target


def import_peft(source: Path, base: Path, target: Path) -> Path:
    """Write peft's adapter folder `source`, for the weights `base`, as a checkpoint of the new run folder `target`.

    `base`: a Hugging Face folder, a run or a checkpoint; its tokenizer and chat template are copied. To train from the
    result: tune.mode=lora, checkpoint.load=target, checkpoint.load_optim=false. Returns the step folder. Raises
    ValueError, naming the key or tensor, for anything but plain LoRA.
    """
    require_new(target, "target")
    base = base if is_hf(base) else find(base)
    settings = read_settings(source)
    tune = tune_config(settings)
    config = dataclasses.replace(_config_for(base, target), tune=tune)
    factors = _read_factors(source / "adapter_model.safetensors")
    every = _peft_names(config)
    tune = dataclasses.replace(tune, lora_targets=_targets(config, set(factors), source))
    config = dataclasses.replace(config, tune=tune)
    known, expected = _peft_names(config), config.shapes.factors
    for name in sorted(set(factors) ^ set(known.values())):
        why = f"belongs to no linear of {base}" if name in factors else "is missing, though another layer has it"
        raise ValueError(f"{source}: tensor {shown(name)} {why}; every layer needs factors for the same linears")
    require_targets(settings, map(_module_of, factors), map(_module_of, every.values()))
    for ours, theirs in known.items():
        if tuple(factors[theirs].shape) != expected[ours]:
            raise ValueError(
                f"{source}: tensor {theirs} is {list(factors[theirs].shape)}, for {base} it must be "
                f"{list(expected[ours])}; is that the right base?"
            )

    def get(full: str) -> Tensor:
        factor = factors[known[full.removeprefix("weight.")]]
        return factor[_fused_rows(config).argsort()] if full.endswith(".lora_qkv.b") else factor

    hf, files = (base, []) if is_hf(base) else _model_files(base.parents[1])
    with new_folder(target) as building:
        if hf is not None:
            keep_files(hf, building)
        for file in files:
            shutil.copyfile(file, building / file.name)
        described = {f"weight.{name}": (factors[known[name]].dtype, shape) for name, shape in expected.items()}
        write_whole(step_folder(building, 0), config, described, get, dataclasses.asdict(State(base=name_of(base))))
        (building / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return step_folder(target, 0)


def _model_files(run_dir: Path) -> tuple[Path | None, list[Path]]:
    """A run's folder hf/, if it has one, and the files of its tokenizer and chat template."""
    hf = run_dir / "hf"
    return hf if hf.is_dir() else None, [*run_dir.glob("tokenizer*"), *run_dir.glob("chat_template.jinja")]


def _config_for(base: Path, run_dir: Path) -> Resolved:
    """The configuration of a new run in `run_dir` that starts from the weights `base`."""
    if is_hf(base):
        folder = open_folder(base)
        model = dataclasses.replace(folder.model, from_hf=str(base.resolve()))
        return resolve(Config(model=model, train=TrainConfig(run_dir=str(run_dir), seq_len=folder.context)), 1)
    config = config_of(read_manifest(base))
    load = dataclasses.replace(config.checkpoint, load=str(base.resolve()))
    return dataclasses.replace(config, checkpoint=load, train=dataclasses.replace(config.train, run_dir=str(run_dir)))


def _read_factors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; save the adapter again as safetensors")
    read_tensors(file)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); save the adapter again as safetensors") from None


def _peft_names(config: Resolved) -> dict[str, str]:
    """peft's name of every factor by ours."""
    found = {}
    for linear, chosen in adapted(config.model, config.tune).items():
        there = names_there(f"{linear}.weight", config.model)
        modules = dict(zip((p.name for p in projections(config.model)[linear.split(".", 2)[2]]), there, strict=True))
        for p in chosen:
            theirs = PREFIX + modules[p.name].removesuffix(".weight")
            found[f"{linear}.lora_{p.name}.a"] = f"{theirs}.lora_A.weight"
            found[f"{linear}.lora_{p.name}.b"] = f"{theirs}.lora_B.weight"
    return found


def _module_of(factor: str) -> str:
    """The module of the base that a peft factor belongs to."""
    return factor.removeprefix(PREFIX).rsplit(".", 2)[0]


def _fused_rows(config: Resolved) -> Tensor:
    """For each row of GPT-2's [queries, keys, values], its index in our qkv, which is ordered by kv group."""
    m = config.model
    rows = torch.arange((m.num_heads + 2 * m.num_kv_heads) * m.head_dim).view(m.num_kv_heads, -1, m.head_dim)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


def _targets(config: Resolved, names: set[str], source: Path) -> str:
    """tune.lora_targets for the peft factors `names`. Raises ValueError if none is of a linear of a block."""
    used = set()
    for ours, theirs in _peft_names(config).items():
        if theirs in names:
            linear, projection = ours.split(".", 2)[2].rsplit(".", 2)[:2]
            used.add((linear, projection.removeprefix("lora_")))
    patterns = []
    for linear, inside in projections(config.model).items():
        chosen = [p.there for p in inside if (linear, p.name) in used]
        patterns += [linear] if len(chosen) == len(inside) else chosen
    if not patterns:
        raise ValueError(f"{source} has no factor for any linear of this model's blocks; is that the right base?")
    return " ".join(patterns)
