"""What a run takes over from the weights it starts from, and which of two contradicting wishes is meant.

What stands on the command line is meant. A file that --config names, often the config.yaml of another run, gives way to
it, and presets give way to what is loaded; each time the user is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.contents import is_adapter
from megalite.checkpoint.folder import complete, read_manifest
from megalite.config import Config, ModelConfig, Request, from_mapping
from megalite.config.batch import total_samples
from megalite.config.read import read_yaml_file
from megalite.config.shapes import with_family
from megalite.data.origin import tokenizer_of_run
from megalite.exchange.base import is_hf
from megalite.exchange.hf_config import set_by_user
from megalite.exchange.hf_folder import find_tokenizer
from megalite.run.request import begin_with
from megalite.text.chat import find_template
from megalite.text.tokenizer import load_tokenizer

Say = Callable[[str], None]


def replaced(request: Request, **sections: Mapping[str, Any]) -> Request:
    """The request with other values: section={key: value}."""
    config = request.config
    new = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(request, config=dataclasses.replace(config, **new))


def settle(request: Request, say: Say) -> Request:
    """The request without what the file of --config says against the command line."""
    path = request.file
    if path is None:
        return request
    file = from_mapping(read_yaml_file(Path(path)), path)
    if _is_run_config(path):
        # how that run took up its weights is its own affair
        request = dataclasses.replace(request, explicit=request.explicit - ({"checkpoint.load_optim"} - request.typed))
    request = _other_data(request, file, say)
    request = _other_weights(request, say)
    request = _other_length(request, file, say)
    load, run_dir = request.config.checkpoint.load, Path(path).parent.resolve()
    if load and _is_run_config(path) and run_dir in (Path(load).resolve(), *Path(load).resolve().parents):
        # the run keeps its tokenizer, and a chat template beside it, in its folder
        keys = {"data.tokenizer", "data.template"} - request.typed
        request = replaced(request, data={key.removeprefix("data."): None for key in keys})
        request = dataclasses.replace(request, explicit=request.explicit - keys)
    return request


def _is_run_config(file: str) -> bool:
    return Path(file).name == "config.yaml" and bool(complete(Path(file).parent))


def _other_data(request: Request, file: Config, say: Say) -> Request:
    """Without the data of the file where the command line names data of the other kind; in a run folder of its own."""
    for mine, other in (("sft", "path"), ("path", "sft")):
        was = getattr(file.data, other)
        if f"data.{mine}" not in request.typed or getattr(request.config.data, mine) is None or was is None:
            continue
        if f"data.{other}" not in request.typed:
            say(f"data.{other}={was} of {request.file} is left out: data.{mine} is set")
            request = replaced(request, data={other: None})
        if "data.valid" not in request.typed and file.data.valid:
            say(f"data.valid of {request.file} is left out: its sets are of the other kind")
            request = replaced(request, data={"valid": {}})
        return _beside(request, say)
    return request


def _beside(request: Request, say: Say) -> Request:
    """A run that begins with the weights of the run whose config.yaml was named, in another folder than it."""
    assert request.file is not None
    source = Path(request.file).parent
    if not _is_run_config(request.file):
        return request
    if not {"checkpoint.load", "model.from_hf"} & request.typed:
        say(f"checkpoint.load={source}: the run whose configuration was named")
        request = replaced(request, checkpoint={"load": str(source)}, model={"from_hf": None})
    if "train.run_dir" not in request.typed:
        kind = "sft" if request.config.data.sft else "pretrain"
        folder = source.with_name(f"{kind}-{source.name}")
        say(f"train.run_dir={folder}: {source} keeps the run that it holds")
        request = replaced(request, train={"run_dir": str(folder)})
    return request


def _other_weights(request: Request, say: Say) -> Request:
    """Without the weights of the file where the command line names others."""
    load, from_hf = request.config.checkpoint.load, request.config.model.from_hf
    if load is None or from_hf is None:
        return request
    if "checkpoint.load" in request.typed and "model.from_hf" not in request.typed:
        say(f"model.from_hf={from_hf} of {request.file} is left out: checkpoint.load is set")
        return replaced(request, model={"from_hf": None})
    if "model.from_hf" in request.typed and "checkpoint.load" not in request.typed:
        say(f"checkpoint.load={load} of {request.file} is left out: model.from_hf is set")
        return replaced(request, checkpoint={"load": None})
    return request


def _other_length(request: Request, file: Config, say: Say) -> Request:
    """Without the length of the file, and the decay that was computed from it, where the command line has another."""
    mine = {"train.steps", "train.epochs"} & request.typed
    if not mine:
        return request
    if mine == {"train.epochs"} and request.config.train.epochs is not None and "train.steps" in request.explicit:
        say(f"train.steps={request.config.train.steps} of {request.file} is left out: train.epochs is set")
        request = dataclasses.replace(request, explicit=request.explicit - {"train.steps"})
    if mine == {"train.steps"} and request.config.train.epochs is not None:
        say(f"train.epochs={request.config.train.epochs:g} of {request.file} is left out: train.steps is set")
        request = replaced(request, train={"epochs": None})
    decay = file.optim.decay_samples
    if decay is not None and decay == total_samples(file) and "optim.decay_samples" not in request.typed:
        say(f"optim.decay_samples={decay} of {request.file} is left out: it was the length of that run")
        request = replaced(request, optim={"decay_samples": None})
    return request


def with_loaded(request: Request, tuning: bool, say: Say) -> Request:
    """With the model that checkpoint.load names, and what else belongs to these weights, where the user sets no other.

    ConfigError where the user has set the model to something else.
    """
    load = request.config.checkpoint.load
    if load is None:
        return request
    if is_hf(Path(load)) and not complete(Path(load)):
        if request.config.model.from_hf is not None:
            return request  # two names for the weights: told by check
        say(f"checkpoint.load={load} is a Hugging Face folder: taken as model.from_hf={load}")
        return replaced(request, checkpoint={"load": None}, model={"from_hf": load})
    source = begin_with(load, Path(request.config.train.run_dir))
    manifest = read_manifest(source)
    saved = manifest["config"]
    try:
        # the tokenizer in the run's folder has the tokens that were added
        model = dataclasses.replace(with_family(ModelConfig(**saved["model"])), from_hf=None, add_tokens=())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source}: written by another version of megalite ({error}); use that one") from None
    request = _with_model(request, model, load, say)
    if tuning and "checkpoint.load_optim" not in request.explicit:
        request = replaced(request, checkpoint={"load_optim": False})
    length = saved.get("train", {}).get("seq_len")
    if isinstance(length, int) and length < request.config.train.seq_len and "train.seq_len" not in request.explicit:
        say(f"train.seq_len={length}: {load} was trained on so many tokens")
        request = replaced(request, train={"seq_len": length})
    if is_adapter(manifest):
        request = _with_adapter(request, saved["tune"], load, say)
    data = request.config.data
    if (
        tuning
        and data.tokenizer is not None
        and "data.tokenizer" not in request.typed
        and not Path(data.tokenizer).exists()
    ):
        request = replaced(request, data={"tokenizer": None})
    if tuning and request.config.data.tokenizer is None and find_tokenizer(source.parents[1]) is None:
        found = tokenizer_of_run(saved.get("data", {}), source.parents[1])
        request = replaced(request, data={"tokenizer": str(found) if found else None})
    return request


def _with_model(request: Request, model: ModelConfig, load: str, say: Say) -> Request:
    config = request.config
    chosen = set_by_user(request, model, load, "checkpoint.load")
    if request.preset_named and not str(request.preset).startswith("sft-"):
        return request  # a preset of a model was asked for by name: another model is a mistake, told later
    if model != config.model:
        say(f"model of {load}: {model.num_layers} layers of {model.hidden_size}, {model.vocab_size} tokens")
    return dataclasses.replace(request, config=dataclasses.replace(config, model=dataclasses.replace(model, **chosen)))


def _with_adapter(request: Request, tune: Mapping[str, Any], load: str, say: Say) -> Request:
    """With the mode and the shape of the factors that are loaded."""
    if "tune.mode" in request.explicit and request.config.tune.mode != "lora":
        return request
    keys = [key for key in ("mode", "lora_rank", "lora_alpha", "lora_targets") if f"tune.{key}" not in request.explicit]
    values = {key: tune[key] for key in keys if tune[key] != getattr(request.config.tune, key)}
    if values:
        say(f"{', '.join(f'tune.{key}={value}' for key, value in values.items())}: as in {load}")
    return replaced(request, tune=values)


def with_template(request: Request, say: Say) -> Request:
    """With the plainest chat template where the tokenizer came along with the weights and no template did."""
    data = request.config.data
    text = data.sft is not None and data.sft.endswith((".jsonl", ".json", ".parquet"))
    if not text or data.template is not None or data.tokenizer is None or "data.tokenizer" in request.explicit:
        return request
    try:
        find_template(None, load_tokenizer(data.tokenizer))
    except ValueError:
        say(f"data.template=plain: {data.tokenizer} has no chat template of its own")
        return replaced(request, data={"template": "plain"})
    return request
