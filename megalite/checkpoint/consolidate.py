"""Rewrite a checkpoint from one process, each tensor whole, as a new run folder that does not need the old one."""

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

# files of a run folder, beside its checkpoints, that generation and export read
RUN_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates", "hf"),
)


def consolidate(source: Path, manifest: dict[str, Any], target: Path, weights_only: bool = False) -> Path:
    """Write checkpoint `source` as the only checkpoint of the new run folder `target`. Returns the new step folder.

    `weights_only`: leave out the optimizer's tensors. Every block read is verified. Memory: the largest tensor and one
    block. Raises ValueError if `target` exists, and Damaged as in `read_tensor`; `target` is then not created.
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
        for name in RUN_FILES:
            kept = source.parent.parent / name
            if kept.is_dir():
                shutil.copytree(kept, building / name)
            elif kept.is_file():
                shutil.copyfile(kept, building / name)
    return step_folder(target, manifest["step"])
