"""The data of instruction tuning: conversations packed into rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.config import Config, DataConfig
from megalite.data.instructions import Options, prepare
from megalite.data.packing import Conversations, SftDataset
from megalite.data.sets import DataSets, check_size, check_token_ids, check_tokenizer_file, explain
from megalite.data.survey import Survey, shown_path, survey
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.tokenizer import load_tokenizer

_log = logging.getLogger(__name__)

# what a run needs to know of instruction data, from its sidecar
NEEDED = {
    **dict.fromkeys(("tokens", "trained_tokens"), int),
    **dict.fromkeys(("tokenizer_sha256", "template_name", "template", "train_on", "control_tokens", "bad_rows"), str),
    **{"report": dict, "sources": list},
}


def open_conversations(config: Config, scan: bool = True) -> DataSets:
    """Open and check data.sft and its held-out sets, of a resolved configuration.

    Files of conversations are tokenized into data.cache_dir first; a prefix is opened as it is. scan: read small data
    through for token ids that the model does not have, which one rank should do. Raises ValueError, with a remedy, for
    anything wrong with the data.
    """
    d, t = config.data, config.train
    if d.sft is None:
        raise ValueError(
            "data.sft is not set: which conversations should the model learn from? e.g. data.sft=chats.jsonl "
            "data.tokenizer=tokenizer.json checkpoint.load=runs/llama2-7b"
        )
    check_tokenizer_file(config)
    surveys: dict[str, Survey] = {}
    for name, key, path in _sources(config):
        data = _conversations(path, key, config)
        surveys[name] = survey(data, shown_path(data, path), t.seq_len, d.overlong)
        surveys[name].require_some(f"{key}={path}")
    opened = {name: each.data for name, each in surveys.items()}
    chosen = {name: each.chosen for name, each in surveys.items()}
    if not d.valid and d.valid_fraction > 0:
        opened["valid"] = opened[""]
        chosen |= _hold_out(chosen[""], config)
    if scan:
        for data in {id(x): x for x in opened.values()}.values():
            check_token_ids(data.tokens, config)
    sets = {
        name: SftDataset(
            data,
            chosen[name],
            t.seq_len,
            seed=None if name else t.seed,
            packing=d.packing,
            overlong=d.overlong,
        )
        for name, data in opened.items()
    }
    train = sets.pop("")
    for name, each in surveys.items():
        rows = sets[name] if name else train
        filled = f"{len(rows)} rows of {t.seq_len}, {100 * rows.filled:.1f} % full"
        _log.info("%s: %s; %s", Path(each.path).name, each.summary(), filled)
        for note in each.notes():
            _log.info("warning: %s", note)
    return DataSets(
        train,
        sets,
        dict.fromkeys(sets),
        f"{Path(d.sft).name}: {len(train.pieces)} conversations in {len(train)} rows of {t.seq_len}",
        opened[""].sidecar["template"],
    )


def _hold_out(numbers: NDArray[np.int64], config: Config) -> dict[str, NDArray[np.int64]]:
    """The conversations to train on, and of the set `valid`: data.valid_fraction of them, drawn by train.seed."""
    d, count = config.data, len(numbers)
    held = max(1, round(count * d.valid_fraction))
    if held >= count:
        raise ValueError(
            f"data.sft={d.sft}: data.valid_fraction={d.valid_fraction} of {count} conversations leaves none to "
            f"train on; set data.valid_fraction=0, or hold out your own file with data.valid.NAME=FILE"
        )
    # a file is often sorted by topic: its end would be one of them
    shuffled = numbers[np.random.Generator(np.random.Philox(key=[config.train.seed, 0])).permutation(count)]
    return {"": np.sort(shuffled[held:]), "valid": np.sort(shuffled[:held])}


def _sources(config: Config) -> Iterator[tuple[str, str, str]]:
    """(name, key, path) of the training file, whose name is empty, and of each held-out one."""
    assert config.data.sft is not None
    yield "", "data.sft", config.data.sft
    for name, path in config.data.valid.items():
        yield name, f"data.valid.{name}", path


def _conversations(path: str, key: str, config: Config) -> Conversations:
    d = config.data
    prefix: str | Path = path
    if path.endswith((".jsonl", ".json", ".parquet")):
        if d.tokenizer is None:
            raise ValueError(f"{key}={path}: text needs data.tokenizer, a sentencepiece .model or a tokenizer.json")
        if not Path(path).is_file():
            explain(key, path, join="cat FILE FILE > all.jsonl")
            raise ValueError(f"{key}={path}: no such file; name a .jsonl, .json or .parquet file of conversations")
        tokenizer = load_tokenizer(d.tokenizer, config.model.add_tokens)
        check_size(tokenizer, config)
        template = ChatTemplate(*find_template(d.template, tokenizer), tokenizer)
        prefix = prepare(path, d.cache_dir, tokenizer, template, Options(d.train_on, d.control_tokens, d.bad_rows))
    elif Path(path).is_file():
        raise ValueError(
            f"{key}={path}: instruction data is .jsonl, .json or .parquet, or a prefix of tools/data.py sft"
        )
    try:
        found = Conversations(prefix)
    except ValueError as error:
        raise ValueError(f"{key}={path}: {error}") from None
    if missing := [name for name, kind in NEEDED.items() if not isinstance(found.sidecar.get(name), kind)]:
        raise ValueError(
            f"{key}={path} was made by an older megalite or is damaged: {prefix}.json says nothing of "
            f"{', '.join(missing)}; make it again with tools/data.py sft"
        )
    if prefix is path:
        _check_made_alike(f"{key}={path}", found.sidecar, config)
    return found


def _check_made_alike(which: str, sidecar: Mapping[str, Any], config: Config) -> None:
    """ValueError where a prefix was made otherwise than the configuration asks for: it is not made again."""
    asked = {key: getattr(config.data, key) for key in ("train_on", "control_tokens", "bad_rows")}
    usual = DataConfig()
    for key, value in asked.items():
        if value not in (getattr(usual, key), sidecar[key]):
            raise ValueError(f"{which} was made with {key}={sidecar[key]}, data.{key}={value}; make it again")
    template = config.data.template
    if template is not None and Path(template).name != sidecar["template_name"]:
        raise ValueError(
            f"{which} was made with template {sidecar['template_name']}, data.template={template}; make it again"
        )
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.add_tokens)
        if tokenizer.fingerprint != sidecar["tokenizer_sha256"]:
            raise ValueError(
                f"{which} was made with another tokenizer than data.tokenizer={tokenizer.path}; name that one, "
                f"or make it again"
            )
        check_size(tokenizer, config)
