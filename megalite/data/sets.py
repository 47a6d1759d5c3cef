"""The data of a run: one endless training order and any number of named held-out sets."""

from __future__ import annotations

import bisect
import glob
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.config import Config, DataConfig
from megalite.data.dataset import PretrainDataset, Samples, Section, check_vocabulary, heldout_windows
from megalite.data.indexed import IndexedDataset, paths
from megalite.data.instructions import Options, prepare
from megalite.data.native import open_indexed
from megalite.data.origin import find_tokenizer_of
from megalite.data.packing import Conversations, SftDataset
from megalite.data.survey import Survey, shown_path, survey
from megalite.text.chat import ChatTemplate, find_template
from megalite.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_file

_log = logging.getLogger(__name__)

# Reading a whole stream to look for a wrong token id is worth it up to this size; every batch is checked anyway.
SCAN_TOKENS = 200_000_000
# what a run wants to know of instruction data, from its sidecar
NEEDED = {
    **dict.fromkeys(("tokens", "trained_tokens"), int),
    **dict.fromkeys(("tokenizer_sha256", "template_name", "template", "train_on", "control_tokens", "bad_rows"), str),
    **{"report": dict, "sources": list},
}
# of a held-out set so many tokens are decoded to learn how many bytes of text they are: seconds
DECODED_TOKENS = 5_000_000


@dataclass(frozen=True)
class DataSets:
    """`len(train)` is one epoch.

    `bytes_per_token` of a held-out set (None if its text is not known) turns nats per token into bits per byte.
    """

    train: Samples
    heldout: Mapping[str, Samples]
    bytes_per_token: Mapping[str, float | None]
    fingerprint: str
    # the chat template of instruction data, which belongs to the run
    template: str | None = None


def open_data(config: Config, scan: bool = True) -> DataSets:
    """Open and check the data of a resolved configuration. ValueError with a remedy for anything wrong with it.

    `scan`: read small streams through for token ids the model does not have (one rank is enough).
    """
    d, t = config.data, config.train
    if d.tokenizer is not None:
        if not (Path(d.tokenizer).is_dir() or d.tokenizer.endswith((".model", ".json"))):
            raise ValueError(
                f"data.tokenizer={d.tokenizer}: name a sentencepiece .model, a tokenizer.json or the folder of one"
            )
        tokenizer_file(d.tokenizer)
    if d.sft is not None:
        return _open_conversations(config, scan)
    if d.path is None:
        raise ValueError(
            "data.path is not set: what should the model learn from? Make data of a text, then name it:\n"
            "  python tools/preprocess_data.py --input corpus.jsonl --tokenizer-model tokenizer.model --append-eod "
            "--output-prefix data/corpus\n"
            "  torchrun --nproc_per_node 8 examples/pretrain_7b.py data.path=data/corpus_text_document"
        )
    whole = _open(d.path, "data.path", d.reader)
    if d.tokenizer is not None:
        _check_size(load_tokenizer(d.tokenizer), config)
    if whole.num_tokens <= t.seq_len:
        raise ValueError(
            f"data.path={d.path}: the data has {whole.num_tokens} tokens, but one sample of train.seq_len={t.seq_len} "
            f"needs {t.seq_len + 1}; use more data or a smaller train.seq_len"
        )
    train = whole
    heldout: dict[str, IndexedDataset] = {
        name: _open(prefix, f"data.valid.{name}", d.reader) for name, prefix in d.valid.items()
    }
    if not heldout and d.valid_fraction > 0:
        starts = whole.document_starts.tolist()
        cut = bisect.bisect_left(starts, whole.num_tokens * (1 - d.valid_fraction))
        if 0 < cut < whole.num_documents:
            train, heldout = Section(whole, 0, cut), {"valid": Section(whole, cut, whole.num_documents)}
        else:
            raise ValueError(
                f"{d.path}: data.valid_fraction={d.valid_fraction} of {whole.num_documents} documents holds out none; "
                f"set data.valid_fraction=0, or hold out your own set with data.valid.NAME=PREFIX"
            )
    if train.num_tokens <= t.seq_len:
        raise ValueError(
            f"data.valid_fraction={d.valid_fraction} of {d.path} leaves {train.num_tokens} tokens to train on, but one "
            f"sample of train.seq_len={t.seq_len} needs {t.seq_len + 1}; hold out less, or use more data"
        )
    for data in {id(x): x for x in (whole, *heldout.values())}.values() if scan else ():
        _check_vocabulary(data, config)
    return DataSets(
        PretrainDataset(train, t.seq_len, t.seed, isolate_documents=d.isolate_documents),
        {n: _windows(n, x, config) for n, x in heldout.items()},
        {n: _bytes_per_token(x, d.tokenizer, scan) for n, x in heldout.items()},
        f"{Path(d.path).name}: {train.num_tokens} tokens in {train.num_documents} documents",
    )


def _windows(name: str, data: IndexedDataset, config: Config) -> Samples:
    d, key = config.data, f"data.valid.{name}"
    if not d.valid:
        key = f"data.valid_fraction={d.valid_fraction} of {d.path}"
    if data.num_tokens < 2:
        raise ValueError(f"{key}: holds out {data.num_tokens} tokens, and one prediction needs 2; hold out more")
    return heldout_windows(data, config.train.seq_len, isolate_documents=d.isolate_documents)


def _check_size(tokenizer: Tokenizer, config: Config) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer={tokenizer.path} has {tokenizer.vocab_size} tokens, model.vocab_size="
            f"{config.model.vocab_size}; name the tokenizer that the model was made with"
        )


def _check_vocabulary(data: IndexedDataset, config: Config) -> None:
    made, size = data.sidecar.get("vocab_size"), config.model.vocab_size
    if isinstance(made, int) and made <= size:
        return
    if data.num_tokens <= SCAN_TOKENS:
        check_vocabulary(data, size)
    elif isinstance(made, int):
        raise ValueError(
            f"{data.prefix} was made with a tokenizer of {made} tokens, model.vocab_size={size}; make the data with "
            f"the model's own tokenizer"
        )


def _open_conversations(config: Config, scan: bool) -> DataSets:
    """Instruction data: files are made ready in data.cache_dir, a prefix is taken as it is."""
    d, t = config.data, config.train
    assert d.sft is not None
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
            _check_vocabulary(data.tokens, config)
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
            _explain(key, path, tuning=True)
            raise ValueError(f"{key}={path}: no such file; name a .jsonl, .json or .parquet file of conversations")
        tokenizer = load_tokenizer(d.tokenizer, config.model.add_tokens)
        _check_size(tokenizer, config)
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
        _check_size(tokenizer, config)


def _open(prefix: str, key: str, reader: str) -> IndexedDataset:
    if not paths(prefix)[1].is_file():
        _explain(key, prefix)
    try:
        return open_indexed(prefix, reader)
    except ValueError as error:
        raise ValueError(f"{key}={prefix}: {error}") from None


def _explain(key: str, path: str, tuning: bool = False) -> None:
    """ValueError where a path that names no data can be seen to be something else."""
    text = (".jsonl", ".json", ".txt", ".parquet", ".gz")
    many = re.search(r"[*?\[]|,|\s", path)
    if many and not Path(path).exists():
        how = "cat FILE FILE > all.jsonl" if tuning else "tools/preprocess_data.py --input FILE FILE"
        why = f"names several files, and a run reads one; make one of them with {how} and name that"
    elif path.endswith((".bin", ".idx")):
        why = f"is a file; name the prefix, {key}={path[:-4]}"
    elif Path(path).is_dir():
        why = "is a folder; name the prefix of a .bin/.idx pair in it, its path without the suffix"
    elif path.endswith(text) and Path(path).is_file():
        why = "is text; make tokens of it with tools/preprocess_data.py first, or train on conversations with data.sft"
    elif found := sorted(Path(path).parent.glob(f"{glob.escape(Path(path).name)}_*_document.idx")):
        why = f"no such file; did you mean {str(found[0])[:-4]}?"
    else:
        return
    raise ValueError(f"{key}={path}: {why}")


def _bytes_per_token(data: IndexedDataset, tokenizer: str | None, scan: bool) -> float | None:
    """Bytes of text for each token that is predicted; None where the text is not known, or with `scan` false."""
    if isinstance(data, Section):
        return _decoded_bytes_per_token(data, tokenizer) if scan else None
    found = data.sidecar.get("text_bytes")
    # the first token of the stream is never predicted
    return found / max(1, data.num_tokens - 1) if isinstance(found, int) and found > 0 else None


def _decoded_bytes_per_token(data: Section, path: str | None) -> float | None:
    """By the text that the documents decode to: of all, or of a very large set those evenly spread over it.

    None where the tokenizer that the data was made with is not at hand.
    """
    found = path or find_tokenizer_of(data.whole.prefix)
    tokenizer = load_tokenizer(found) if found else None
    if tokenizer is None or tokenizer.fingerprint != data.whole.sidecar.get("tokenizer_sha256"):
        return None
    starts = [*data.document_starts.tolist(), data.num_tokens]
    every = -(-data.num_tokens // DECODED_TOKENS)
    size = tokens = 0
    for first, last in list(itertools.pairwise(starts))[::every]:
        size += len(tokenizer.decode(data.tokens(first, last).tolist()).encode())
        tokens += last - first
    # the first token of the stream is never predicted
    return size / max(1, tokens - (every == 1))
