"""What a command line leaves open, filled in from its preset and its data.

No torch: a run that cannot go on as it is asked for is refused before torch has loaded. `say` tells the user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint.folder import complete, find
from megalite.config import Config, ConfigError, Request
from megalite.data.indexed import paths
from megalite.data.origin import find_tokenizer_of, made_with, recorded_tokenizer
from megalite.exchange.hf_folder import find_tokenizer
from megalite.text.tokenizer import load_tokenizer

Say = Callable[[str], None]


def one_length(request: Request) -> Request:
    """The request with train.steps or train.epochs, whichever the user set; the other is the preset's."""
    config, both = request.config, {"train.steps", "train.epochs"} & request.explicit
    if config.train.epochs is None or "train.steps" not in both:
        return request
    if len(both) == 2:
        raise ConfigError(
            f"train.steps={config.train.steps} and train.epochs={config.train.epochs:g} are both set; set one of them"
        )
    train = dataclasses.replace(config.train, epochs=None)
    return dataclasses.replace(request, config=dataclasses.replace(config, train=train))


def apart(request: Request) -> Request:
    """The request with a run folder of its own where its preset also pretrains: else it would go on from there."""
    if (request.preset or "").startswith("sft-") or "train.run_dir" in request.explicit:
        return request
    config = request.config
    folder = Path(config.train.run_dir)
    train = dataclasses.replace(config.train, run_dir=str(folder.with_name(f"sft-{folder.name}")))
    return dataclasses.replace(request, config=dataclasses.replace(config, train=train))


def begin_with(load: str, run_dir: Path) -> Path:
    """The checkpoint named by checkpoint.load; where it is gone, that of the run itself, which goes on from its own."""
    try:
        return find(load)
    except ValueError:
        own = complete(run_dir)
        if not own:
            raise
        return own[-1]


def with_tokenizer(request: Request, say: Say) -> Request:
    """With the tokenizer of the run it starts from, and so its chat template, where the request names none."""
    config, load = request.config, request.config.checkpoint.load
    if load is None or config.data.sft is None or config.data.tokenizer is not None:
        return request
    run_dir = begin_with(load, Path(config.train.run_dir)).parents[1]
    tokenizer = find_tokenizer(run_dir)
    if tokenizer is None:
        return request
    own = config.data.template is None and (run_dir / "chat_template.jinja").is_file()
    if not request.print_config:
        say(f"data.tokenizer={tokenizer}" + (f", data.template={run_dir / 'chat_template.jinja'}" if own else ""))
    data = dataclasses.replace(config.data, tokenizer=str(tokenizer))
    return dataclasses.replace(request, config=dataclasses.replace(config, data=data))


def with_added_tokens(request: Request) -> Request:
    """With model.add_tokens: a vocabulary that has room for them."""
    config, add = request.config, request.config.model.add_tokens
    if not add:
        return request
    wrong = [token for token in add if not token.strip() or token != token.strip()]
    if wrong or len(set(add)) < len(add):
        what = f"{wrong[0]!r} begins or ends with a space, or is empty" if wrong else "a token stands there twice"
        raise ConfigError(f"model.add_tokens: {what}; write each token once, e.g. [<|im_start|>, <|im_end|>]")
    if config.data.tokenizer is None:
        raise ConfigError("model.add_tokens: to which tokenizer? Set data.tokenizer too")
    if config.tune.mode == "lora":
        raise ConfigError(
            "model.add_tokens: tune.mode=lora does not train the embeddings, so new tokens would never mean anything; "
            "use tune.mode=full, or a template whose control strings the tokenizer has"
        )
    size = max(config.model.vocab_size, load_tokenizer(config.data.tokenizer, add).vocab_size)
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(request, config=dataclasses.replace(config, model=model))


def with_data_tokenizer(config: Config, say: Say) -> Config:
    """With the tokenizer that the data was made with, where none is named; without it no text comes of the model."""
    d, prefix = config.data, config.data.sft or config.data.path
    if prefix is None or not paths(prefix)[1].is_file():
        return config
    needed = "generate, evaluate and export need it: set data.tokenizer"
    if d.tokenizer is not None:
        if not made_with(prefix, load_tokenizer(d.tokenizer)):
            say(
                f"note: {prefix} was made with another file than data.tokenizer={d.tokenizer}: "
                f"{recorded_tokenizer(prefix)}"
            )
    elif found := find_tokenizer_of(prefix, Path(config.train.run_dir)):
        say(f"data.tokenizer={found}: {prefix} was made with it")
        return dataclasses.replace(config, data=dataclasses.replace(d, tokenizer=str(found)))
    elif name := recorded_tokenizer(prefix):
        say(f"note: the tokenizer that {prefix} was made with is not there or another: {name}; {needed}")
    else:
        say(f"note: {prefix} does not say with which tokenizer it was made; {needed}")
    return config
