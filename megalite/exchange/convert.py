"""Convert a Hugging Face folder to a run folder at step 0, and a checkpoint to a Hugging Face folder, by tensor.

The other files of a model (config.json, tokenizer, chat template, generation settings) are kept in the run folder under
hf/, and exported with it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.contents import config_of, is_adapter
from megalite.checkpoint.dtypes import from_torch, to_torch
from megalite.checkpoint.folder import find, read_manifest, step_folder
from megalite.checkpoint.publish import new_folder
from megalite.checkpoint.save import write_whole
from megalite.checkpoint.state import State
from megalite.config import Config, ResolvedModel, TrainConfig, resolve, to_yaml
from megalite.config.dtypes import DTYPES
from megalite.config.shapes import shapes
from megalite.data.origin import tokenizer_of_run
from megalite.exchange.hf_export import export
from megalite.exchange.hf_folder import carry, find_tokenizer, open_folder, require_new
from megalite.exchange.hf_weights import read_whole, stored_dtype
from megalite.exchange.merge import open_merged, read_base
from megalite.plan.counts import parameters
from megalite.text.tokenizer_files import copy_files
from megalite.watch.progress import Bar


def from_hf_folder(source: Path, target: Path, dtype: str | None = None) -> Path:
    """Write the Hugging Face folder `source` as the new run folder `target`, at step 0. Returns `target`.

    `dtype` (fp32, bf16, ...): for all weights; None: each as stored. Raises ValueError as `open_folder` does, and if
    `target` exists.
    """
    folder = open_folder(source)
    stored = {name: stored_dtype(folder, name) for name in shapes(folder.model)}
    return write_run(
        target,
        folder.model,
        lambda name: read_whole(folder, name),
        dict.fromkeys(stored, to_torch(DTYPES[dtype])) if dtype else stored,
        context=folder.context,
        hf=source,
    )


def write_run(
    target: Path,
    model: ResolvedModel,
    get: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    *,
    context: int,
    hf: Path | None = None,
    files: Iterable[Path] = (),
) -> Path:
    """Write a run folder at step 0 whose parameter `name` is `get(name)`, stored as `dtypes[name]`. Returns `target`.

    `context`: train.seq_len. `hf`: a Hugging Face folder whose other files are kept. `files`: more files, copied into
    the run folder. `target` appears when it is complete.
    """
    require_new(target, "target")
    train = TrainConfig(run_dir=str(target), seq_len=context, dtype=from_torch(next(iter(dtypes.values()))).name)
    config = resolve(Config(model=dataclasses.replace(model, from_hf=None), train=train), 1)
    with new_folder(target) as building, Bar("converting", parameters(config.model)) as bar:
        (building / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        if hf is not None:
            keep_files(hf, building)
        for file in files:
            shutil.copyfile(file, building / file.name)
        write_whole(
            step_folder(building, 0),
            config,
            {f"weight.{name}": (dtypes[name], shape) for name, shape in shapes(model).items()},
            lambda full: read_as(full.removeprefix("weight."), _counted(get, bar), dtypes),
            dataclasses.asdict(State()),
        )
    return target


def keep_files(source: Path, run_dir: Path) -> None:
    """Copy the files of a Hugging Face folder, except weights, to hf/ of a run folder.

    Tokenizer and chat template are also copied to where a run keeps its own.
    """
    carry(source, run_dir / "hf")
    if (tokenizer := find_tokenizer(source)) is not None:
        copy_files(tokenizer, run_dir)


def read_as(name: str, get: Callable[[str], Tensor], dtypes: Mapping[str, torch.dtype]) -> Tensor:
    """The parameter `get(name)` in the dtype `dtypes[name]`. Raises ValueError if a value is too large for it."""
    values = get(name)
    stored = values.to(dtypes[name])
    if stored.dtype == torch.float16 != values.dtype and not bool(stored.isfinite().all()):
        raise ValueError(f"{name} has values beyond 65504, the largest of fp16; use bf16 or fp32")
    return stored


def to_hf_folder(source: Path, target: Path, dtype: str | None = None, shard_bytes: int = 2 * 10**9) -> Path:
    """Write a run folder or checkpoint as the new Hugging Face folder `target`, LoRA factors merged. Returns `target`.

    `dtype` as in `from_hf_folder`; `shard_bytes`: at most, per safetensors file, unless one parameter is larger.
    """
    step = find(source)
    run_dir = step.parent.parent
    manifest = read_manifest(step)
    if is_adapter(manifest):
        config, get, dtype_of = open_merged(step)
    else:
        config = config_of(manifest)
        get, dtype_of = read_base(step)
    stored = {name: dtype_of(name) for name in shapes(config.model)}
    dtypes = dict.fromkeys(stored, to_torch(DTYPES[dtype])) if dtype else stored
    carried, template = run_dir / "hf", run_dir / "chat_template.jinja"
    with Bar("converting", parameters(config.model)) as bar:
        return export(
            target,
            config.model,
            lambda name: read_as(name, _counted(get, bar), dtypes),
            dtypes,
            context=config.train.seq_len,
            carried=carried if carried.is_dir() else None,
            tokenizer=find_tokenizer(run_dir) or tokenizer_of_run(manifest["config"].get("data", {}), run_dir),
            template=template if template.is_file() else None,
            shard_bytes=shard_bytes,
        )


def _counted(get: Callable[[str], Tensor], bar: Bar) -> Callable[[str], Tensor]:
    def counted(name: str) -> Tensor:
        values = get(name)
        bar.advance(values.numel(), name)
        return values

    return counted
