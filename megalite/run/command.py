"""From a command line to a request that is complete: what the files, folders and runs it names fill in.

The command line wins over the file that --config names, often the config.yaml of another run; a file wins over the
weights that the run starts from; and those win over the preset. Each time a line tells the user. No torch here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint.folder import complete
from megalite.config import Config, ConfigError, Request, from_mapping, parse_command_line
from megalite.config.batch import total_samples
from megalite.config.read import read_yaml_file
from megalite.exchange.hf_keys import with_hf
from megalite.run import Say
from megalite.run.inherit import inherit_checkpoint, inherit_template, inherit_tokenizer
from megalite.text.tokenizer import load_tokenizer


def understand(argv: Sequence[str], default_preset: str, tuning: bool, say: Say) -> Request:
    """The request of a command line, completed. `tuning`: of the script for instruction tuning.

    Raises ConfigError or ValueError if the command line, or what it names, is wrong.
    """
    request = parse_command_line(argv, default_preset=default_preset, prog=Path(sys.argv[0]).name)
    if request.print_config:
        say = _silent
    request = steps_or_epochs(prefer_command_line(request, say))
    if tuning:
        request = own_run_folder(request)
    request = with_hf(inherit_checkpoint(request, tuning, say))
    if tuning:
        request = inherit_template(inherit_tokenizer(request, say), say)
    return with_added_tokens(request)


def _silent(text: str) -> None:
    """--print-config prints YAML and nothing else."""


def prefer_command_line(request: Request, say: Say) -> Request:
    """The request without what the --config file sets against the command line."""
    path = request.file
    if path is None:
        return request
    file = from_mapping(read_yaml_file(Path(path)), path)
    if _is_run_config(path) and "checkpoint.load_optim" not in request.typed:
        # how that run took its weights does not bind this one
        request = request.forgetting("checkpoint.load_optim")
    request = _drop_other_data(request, path, file, say)
    request = _drop_other_weights(request, path, say)
    request = _drop_other_length(request, path, file, say)
    load, run_dir = request.config.checkpoint.load, Path(path).parent.resolve()
    if load and _is_run_config(path) and run_dir in (Path(load).resolve(), *Path(load).resolve().parents):
        # the run keeps its tokenizer, and a chat template beside it, in its folder
        keys = {"data.tokenizer", "data.template"} - request.typed
        request = request.replaced(data={key.removeprefix("data."): None for key in keys}).forgetting(*keys)
    return request


def _is_run_config(path: str) -> bool:
    return Path(path).name == "config.yaml" and bool(complete(Path(path).parent))


def _drop_other_data(request: Request, path: str, file: Config, say: Say) -> Request:
    """If the command line names the other kind of data than the file, drop the file's and take another run folder."""
    for mine, other in (("sft", "path"), ("path", "sft")):
        was = getattr(file.data, other)
        if f"data.{mine}" not in request.typed or getattr(request.config.data, mine) is None or was is None:
            continue
        if f"data.{other}" not in request.typed:
            say(f"data.{other}={was} of {path} is ignored: data.{mine} is set")
            request = request.replaced(data={other: None})
        if "data.valid" not in request.typed and file.data.valid:
            say(f"data.valid of {path} is ignored: its sets are of the other kind")
            request = request.replaced(data={"valid": {}})
        return _start_from_run(request, path, say) if _is_run_config(path) else request
    return request


def _start_from_run(request: Request, path: str, say: Say) -> Request:
    """A run in a folder of its own that starts from the weights of the run whose config.yaml is `path`."""
    source = Path(path).parent
    if not {"checkpoint.load", "model.from_hf"} & request.typed:
        say(f"checkpoint.load={source}: the run of --config")
        request = request.replaced(checkpoint={"load": str(source)}, model={"from_hf": None})
    if "train.run_dir" not in request.typed:
        kind = "sft" if request.config.data.sft else "pretrain"
        folder = source.with_name(f"{kind}-{source.name}")
        say(f"train.run_dir={folder}: {source} keeps its own run")
        request = request.replaced(train={"run_dir": str(folder)})
    return request


def _drop_other_weights(request: Request, path: str, say: Say) -> Request:
    """If the command line and the file each name weights to start from, drop the file's."""
    load, from_hf = request.config.checkpoint.load, request.config.model.from_hf
    if load is None or from_hf is None:
        return request
    if "checkpoint.load" in request.typed and "model.from_hf" not in request.typed:
        say(f"model.from_hf={from_hf} of {path} is ignored: checkpoint.load is set")
        return request.replaced(model={"from_hf": None})
    if "model.from_hf" in request.typed and "checkpoint.load" not in request.typed:
        say(f"checkpoint.load={load} of {path} is ignored: model.from_hf is set")
        return request.replaced(checkpoint={"load": None})
    return request


def _drop_other_length(request: Request, path: str, file: Config, say: Say) -> Request:
    """If the command line sets a length, drop the file's, and a decay that was computed from it."""
    train, mine = request.config.train, {"train.steps", "train.epochs"} & request.typed
    if not mine:
        return request
    if mine == {"train.epochs"} and train.epochs is not None and "train.steps" in request.explicit:
        say(f"train.steps={train.steps} of {path} is ignored: train.epochs is set")
        request = request.forgetting("train.steps")
    if mine == {"train.steps"} and train.epochs is not None:
        say(f"train.epochs={train.epochs:g} of {path} is ignored: train.steps is set")
        request = request.replaced(train={"epochs": None})
    decay = file.optim.decay_samples
    computed = decay == total_samples(file.train, file.parallel.dp or 1)
    if computed and "optim.decay_samples" not in request.typed:
        say(f"optim.decay_samples={decay} of {path} is ignored: it was the length of that run")
        request = request.replaced(optim={"decay_samples": None})
    return request


def steps_or_epochs(request: Request) -> Request:
    """The request with the one of train.steps and train.epochs that the user has set, without the preset's other one.

    Raises ConfigError if the user has set both.
    """
    train, both = request.config.train, {"train.steps", "train.epochs"} & request.explicit
    if train.epochs is None or "train.steps" not in both:
        return request
    if len(both) == 2:
        raise ConfigError(f"train.steps={train.steps} and train.epochs={train.epochs:g} are both set; set one of them")
    return request.replaced(train={"epochs": None})


def own_run_folder(request: Request) -> Request:
    """Give an SFT run its own folder, so that it does not continue the pretraining run of the same preset."""
    if (request.preset or "").startswith("sft-") or "train.run_dir" in request.explicit:
        return request
    folder = Path(request.config.train.run_dir)
    return request.replaced(train={"run_dir": str(folder.with_name(f"sft-{folder.name}"))})


def with_added_tokens(request: Request) -> Request:
    """The request with a vocabulary that has room for model.add_tokens. Raises ConfigError if they cannot be added."""
    config, add = request.config, request.config.model.add_tokens
    if not add:
        return request
    wrong = [token for token in add if not token.strip() or token != token.strip()]
    if wrong or len(set(add)) < len(add):
        what = f"{wrong[0]!r} begins or ends with a space, or is empty" if wrong else "a token is listed twice"
        raise ConfigError(f"model.add_tokens: {what}; write each token once, e.g. [<|im_start|>, <|im_end|>]")
    if config.data.tokenizer is None:
        raise ConfigError("model.add_tokens: to which tokenizer? Set data.tokenizer too")
    if config.tune.mode == "lora":
        raise ConfigError(
            "model.add_tokens: tune.mode=lora does not train the embeddings, so new tokens would stay untrained; "
            "use tune.mode=full, or a template whose control strings the tokenizer has"
        )
    size = max(config.model.vocab_size, load_tokenizer(config.data.tokenizer, add).vocab_size)
    return request.replaced(model={"vocab_size": size})
