"""The keys model.from_hf and train.export_hf, except for the weights. No torch here."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

from megalite.checkpoint.folder import find
from megalite.config import Config, ConfigError, Request, Resolved
from megalite.exchange.hf_config import set_by_user, write_model
from megalite.exchange.hf_fields import read_json
from megalite.exchange.hf_folder import carry, find_tokenizer, open_config, open_folder, require_new
from megalite.exchange.hf_rope import rope_context
from megalite.exchange.hf_tokenizer import write_tokenizer


def with_hf(request: Request) -> Request:
    """Set model and tokenizer from the folder model.from_hf, if given. Raises ConfigError if another key disagrees."""
    config, source = request.config, request.config.model.from_hf
    if source is None:
        return request
    model, _ = open_config(source)
    chosen = set_by_user(request, model, f"{source}/config.json", "model.from_hf")
    tokenizer = config.data.tokenizer or find_tokenizer(Path(source))
    data = dataclasses.replace(config.data, tokenizer=str(tokenizer) if tokenizer else None)
    config = dataclasses.replace(config, model=dataclasses.replace(model, from_hf=source, **chosen), data=data)
    return dataclasses.replace(request, config=config)


def check_hf(config: Resolved, resume: Path | None) -> None:
    """Raise ValueError if the folder model.from_hf is damaged, or train.export_hf could not be written at the end."""
    if config.model.from_hf is not None and resume is None:
        open_folder(config.model.from_hf)
    if config.train.export_hf is None or config.train.eval_only:
        return
    target = Path(config.train.export_hf)
    require_new(target, "train.export_hf")
    if target.absolute() == Path(config.train.run_dir).absolute():
        raise ConfigError(f"train.export_hf={target} is train.run_dir; name another folder, e.g. {target / 'export'}")
    kind = write_model(config.model, config.train.seq_len)["model_type"]
    add = config.model.add_tokens
    if config.data.tokenizer is not None and (_model_folder(config, None) is None or add):
        with tempfile.TemporaryDirectory() as trial:
            write_tokenizer(Path(config.data.tokenizer), Path(trial), add, kind)


def context_warning(config: Resolved) -> str:
    """A warning if train.seq_len exceeds the positions that the model's folder was made for, else ''."""
    load, seq_len = config.checkpoint.load, config.train.seq_len
    try:
        folder = _model_folder(config, find(load) if load is not None else None)
        found = read_json(folder / "config.json") if folder is not None and (folder / "config.json").is_file() else {}
    except ValueError:
        return ""  # reported when the weights are read
    context = rope_context(config.model, found.get("max_position_embeddings"))
    if config.model.position != "rope" or context is None or seq_len <= context:
        return ""
    key = "rope_parameters" if found.get("rope_parameters") else "rope_scaling"
    yarn = {"rope_type": "yarn", "factor": float(-(-seq_len // context)), "original_max_position_embeddings": context}
    whole = json.dumps((found.get(key) or {}) | yarn)
    how = "raise the factor" if config.model.rope_scaling != "none" else f'set "{key}": {whole}'
    return (
        f"WARNING: train.seq_len={seq_len} is more than the {context} positions of {folder}/config.json "
        f"(max_position_embeddings, rope_scaling); the model was not trained on those beyond. "
        f"Use train.seq_len={context}, or stretch RoPE: {how} in config.json"
    )


def keep_hf(config: Config, source: Path | None, run_dir: Path) -> None:
    """Copy the model's files, except weights, to `run_dir`/hf, for a later export.

    `source`: the checkpoint that the run starts from; its run may have such files.
    """
    folder = _model_folder(config, source)
    if folder is not None and folder.is_dir() and folder.resolve() != (run_dir / "hf").resolve():
        carry(folder, run_dir / "hf")


def _model_folder(config: Config, source: Path | None) -> Path | None:
    if config.model.from_hf is not None:
        return Path(config.model.from_hf)
    return source.parent.parent / "hf" if source is not None else None
