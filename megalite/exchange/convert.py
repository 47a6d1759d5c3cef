"""A Hugging Face folder as a run folder at step 0, and a checkpoint as a Hugging Face folder; tensor by tensor.

What came with a model beside its weights (config.json, tokenizer, chat template, generation settings) is kept in the
run folder under hf/, and goes back out with it.
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

# the counters of a run that has not begun
FRESH = dataclasses.asdict(State())


def from_hf_folder(source: Path, target: Path, dtype: str | None = None) -> Path:
    """Write the new run folder `target`, at step 0, of the Hugging Face folder `source`.

    `dtype` (fp32, bf16, ...): of all weights; None: each as it is stored. ValueError as in `open_folder`, and where
    `target` is there.
    """
    folder = open_folder(source)
    stored = {name: stored_dtype(folder, name) for name in shapes(folder.model)}
    return write_run(
        target,
        folder.model,
        lambda name: read_whole(folder, name),
        dict.fromkeys(stored, to_torch(DTYPES[dtype])) if dtype else stored,
        context=folder.context,
        beside=source,
    )


def write_run(
    target: Path,
    model: ResolvedModel,
    get: Callable[[str], Tensor],
    dtypes: Mapping[str, torch.dtype],
    *,
    context: int,
    beside: Path | None = None,
    files: Iterable[Path] = (),
) -> Path:
    """Write a run folder at step 0 whose parameter `name` is `get(name)`, to be stored as `dtypes[name]`.

    `beside`: a Hugging Face folder whose other files are kept with it. `files`: others, laid on top. The folder gets
    its name when it is whole.
    """
    require_new(target, "target")
    train = TrainConfig(run_dir=str(target), seq_len=context, dtype=from_torch(next(iter(dtypes.values()))).name)
    config = resolve(Config(model=dataclasses.replace(model, from_hf=None), train=train), 1)
    with new_folder(target) as building, Bar("converting", parameters(config.model)) as bar:
        (building / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        if beside is not None:
            keep_beside(beside, building)
        for file in files:
            shutil.copyfile(file, building / file.name)
        write_whole(
            step_folder(building, 0),
            config,
            {f"weight.{name}": (dtypes[name], shape) for name, shape in shapes(model).items()},
            lambda full: fitting(full.removeprefix("weight."), _counted(get, bar), dtypes),
            FRESH,
        )
    return target


def keep_beside(source: Path, run_dir: Path) -> None:
    """Keep in a run folder what a Hugging Face folder holds beside weights: all under hf/.

    Tokenizer and chat template are on top too, where a run has its own.
    """
    carry(source, run_dir / "hf")
    if (tokenizer := find_tokenizer(source)) is not None:
        copy_files(tokenizer, run_dir)


def fitting(name: str, get: Callable[[str], Tensor], dtypes: Mapping[str, torch.dtype]) -> Tensor:
    """The parameter in the dtype it is to be stored in; ValueError where a value is beyond its largest."""
    values = get(name)
    stored = values.to(dtypes[name])
    if stored.dtype == torch.float16 != values.dtype and not bool(stored.isfinite().all()):
        raise ValueError(f"{name} has values beyond 65504, the largest of fp16; take bf16 or fp32")
    return stored


def to_hf_folder(source: Path, target: Path, dtype: str | None = None, shard_bytes: int = 2 * 10**9) -> Path:
    """Write the new Hugging Face folder `target` of a run folder or one of its checkpoints; LoRA's factors are merged.

    `dtype` as in `from_hf_folder`; `shard_bytes`: of one safetensors file, unless one parameter is larger.
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
            lambda name: fitting(name, _counted(get, bar), dtypes),
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
