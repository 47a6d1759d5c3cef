"""What a run takes over from the weights that it starts from: model, context, LoRA's factors, tokenizer, template.

Only keys that the user has not set are taken over, and a line tells of each. No torch here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megalite.checkpoint.contents import config_of, is_adapter
from megalite.checkpoint.folder import complete, find, read_manifest
from megalite.config import DataConfig, Request, ResolvedModel, TuneConfig
from megalite.data.origin import tokenizer_of_run
from megalite.exchange.base import is_hf
from megalite.exchange.hf_config import set_by_user
from megalite.exchange.hf_folder import find_tokenizer
from megalite.run import Say
from megalite.text.chat import find_template
from megalite.text.tokenizer import load_tokenizer


def first_checkpoint(load: str, run_dir: Path) -> Path:
    """The checkpoint that checkpoint.load=`load` names, or if it is gone the newest of the run itself, in `run_dir`."""
    try:
        return find(load)
    except ValueError:
        own = complete(run_dir)
        if not own:
            raise
        return own[-1]


def inherit_checkpoint(request: Request, tuning: bool, say: Say) -> Request:
    """The request with the model of checkpoint.load, and with what belongs to those weights.

    Raises ConfigError if the user has set the model to something else, ValueError if the checkpoint cannot be read.
    """
    load = request.config.checkpoint.load
    if load is None:
        return request
    if is_hf(Path(load)) and not complete(Path(load)):
        if request.config.model.from_hf is not None:
            return request  # two names for the weights, which `check` refuses
        say(f"checkpoint.load={load} is a Hugging Face folder: taken as model.from_hf={load}")
        return request.replaced(checkpoint={"load": None}, model={"from_hf": load})
    source = first_checkpoint(load, Path(request.config.train.run_dir))
    manifest = read_manifest(source)
    saved = config_of(manifest)
    # the tokenizer in the run's folder already has the tokens that were added
    model = dataclasses.replace(saved.model, from_hf=None, add_tokens=())
    request = _inherit_model(request, model, load, say)
    if tuning and "checkpoint.load_optim" not in request.explicit:
        request = request.replaced(checkpoint={"load_optim": False})
    length = saved.train.seq_len
    if length < request.config.train.seq_len and "train.seq_len" not in request.explicit:
        say(f"train.seq_len={length}: {load} was trained with sequences of that length")
        request = request.replaced(train={"seq_len": length})
    if is_adapter(manifest):
        request = _inherit_adapter(request, saved.tune, load, say)
    return _inherit_data_tokenizer(request, saved.data, source.parents[1]) if tuning else request


def _inherit_model(request: Request, model: ResolvedModel, load: str, say: Say) -> Request:
    chosen = set_by_user(request, model, load, "checkpoint.load")
    if request.preset_named and not str(request.preset).startswith("sft-"):
        return request  # a preset of a model was asked for by name: if it is another model, that is refused later
    if dataclasses.asdict(model) != dataclasses.asdict(request.config.model):
        say(f"model of {load}: {model.num_layers} layers of {model.hidden_size}, {model.vocab_size} tokens")
    config = dataclasses.replace(request.config, model=dataclasses.replace(model, **chosen))
    return dataclasses.replace(request, config=config)


def _inherit_adapter(request: Request, tune: TuneConfig, load: str, say: Say) -> Request:
    """The request with the mode of a LoRA checkpoint and the shape of its factors."""
    if "tune.mode" in request.explicit and request.config.tune.mode != "lora":
        return request
    keys = [key for key in ("mode", "lora_rank", "lora_alpha", "lora_targets") if f"tune.{key}" not in request.explicit]
    values = {key: getattr(tune, key) for key in keys if getattr(tune, key) != getattr(request.config.tune, key)}
    if values:
        say(f"{', '.join(f'tune.{key}={value}' for key, value in values.items())}: as in {load}")
    return request.replaced(tune=values)


def _inherit_data_tokenizer(request: Request, data: DataConfig, run_dir: Path) -> Request:
    """The request with the tokenizer of the data that a run learned from, if its folder has none.

    `data`: that section of the run's configuration.
    """
    named = request.config.data.tokenizer
    if named is not None and "data.tokenizer" not in request.typed and not Path(named).exists():
        request = request.replaced(data={"tokenizer": None})
    if request.config.data.tokenizer is None and find_tokenizer(run_dir) is None:
        found = tokenizer_of_run(dataclasses.asdict(data), run_dir)
        request = request.replaced(data={"tokenizer": str(found) if found else None})
    return request


def inherit_tokenizer(request: Request, say: Say) -> Request:
    """The request with the tokenizer in the folder of the run that it starts from, unless it names one.

    A chat template beside that tokenizer is used with it.
    """
    config, load = request.config, request.config.checkpoint.load
    if load is None or config.data.sft is None or config.data.tokenizer is not None:
        return request
    run_dir = first_checkpoint(load, Path(config.train.run_dir)).parents[1]
    tokenizer, template = find_tokenizer(run_dir), run_dir / "chat_template.jinja"
    if tokenizer is None:
        return request
    also = f", data.template={template}" if config.data.template is None and template.is_file() else ""
    say(f"data.tokenizer={tokenizer}{also}")
    return request.replaced(data={"tokenizer": str(tokenizer)})


def inherit_template(request: Request, say: Say) -> Request:
    """The request with the plain chat template if its tokenizer was inherited and has none."""
    data = request.config.data
    text = data.sft is not None and data.sft.endswith((".jsonl", ".json", ".parquet"))
    if not text or data.template is not None or data.tokenizer is None or "data.tokenizer" in request.explicit:
        return request
    try:
        find_template(None, load_tokenizer(data.tokenizer))
    except ValueError:
        say(f"data.template=plain: {data.tokenizer} has no chat template of its own")
        return request.replaced(data={"template": "plain"})
    return request
