"""A checkpoint written again by one process, each tensor whole: a run folder that needs nothing of the old one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from megalite.checkpoint.contents import config_of
from megalite.checkpoint.describe import state_of
from megalite.checkpoint.dtypes import to_torch
from megalite.checkpoint.folder import step_folder
from megalite.checkpoint.load import read_tensor
from megalite.checkpoint.publish import new_folder
from megalite.checkpoint.save import write_whole
from megalite.config import to_yaml
from megalite.config.dtypes import BY_TORCH

# what a run folder has beside its checkpoints that generating and exporting read
BESIDE = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates", "hf"),
)


def consolidate(source: Path, manifest: dict[str, Any], target: Path, weights_only: bool = False) -> Path:
    """Write checkpoint `source` as the only one of the new run folder `target`; gives the new checkpoint's folder.

    `weights_only`: without the optimizer's tensors. Every block read is verified. Memory: the largest tensor and one
    block. ValueError where `target` is there, Damaged as in `read_tensor`; nothing is left then.
    """
    if target.exists():
        raise ValueError(f"{target} exists; name a new folder")
    config = config_of(manifest)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(target)))
    tensors = {
        name: (to_torch(BY_TORCH[entry["dtype"]]), tuple(entry["shape"]))
        for name, entry in manifest["tensors"].items()
        if name.startswith("weight.") or not weights_only
    }
    if not tensors:
        raise ValueError(f"{source} has no weights; leave out --weights-only")
    with new_folder(target) as building:
        new = step_folder(building, manifest["step"])
        write_whole(new, config, tensors, lambda name: read_tensor(source, manifest, name), state_of(manifest))
        (building / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        for name in BESIDE:
            kept = source.parent.parent / name
            if kept.is_dir():
                shutil.copytree(kept, building / name)
            elif kept.is_file():
                shutil.copyfile(kept, building / name)
    return step_folder(target, manifest["step"])
