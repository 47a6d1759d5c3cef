"""The data of a run: one endless training order and any number of named held-out sets."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalite.config import Config, DataConfig
from megalite.data.chat import ChatTemplate, find_template
from megalite.data.dataset import PretrainDataset, Samples, check_vocabulary, heldout_windows
from megalite.data.indexed import IndexedDataset
from megalite.data.instructions import Options, prepare
from megalite.data.native import open_indexed
from megalite.data.packing import Conversations, SftDataset
from megalite.data.survey import Survey, shown_path, survey
from megalite.data.tokenizer import load_tokenizer

_log = logging.getLogger(__name__)

# Reading a whole stream to look for a wrong token id is worth it up to this size; every batch is checked anyway.
SCAN_TOKENS = 200_000_000


class Section(IndexedDataset):
    """Documents [first, last) of an indexed dataset, read like one of its own."""

    def __init__(self, whole: IndexedDataset, first: int, last: int) -> None:
        starts = np.append(whole.document_starts, whole.num_tokens)
        self.whole, self._documents = whole, (first, last)
        self.prefix, self.bin_path, self.dtype = whole.prefix, whole.bin_path, whole.dtype
        self._start = int(starts[first])
        self.num_tokens = int(starts[last]) - self._start
        self.num_documents = last - first
        self._starts: NDArray[np.int64] = starts[first:last] - self._start

    def __reduce__(self) -> tuple[Any, ...]:
        return Section, (self.whole, *self._documents)

    @property
    def document_starts(self) -> NDArray[np.int64]:  # type: ignore[override]
        return self._starts

    @property
    def sidecar(self) -> dict[str, Any]:  # type: ignore[override]
        return {}

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        return self.whole.tokens(self._start + start, self._start + stop)

    def chunks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        for start in range(0, self.num_tokens, 1 << 20):
            yield start, self.tokens(start, min(start + (1 << 20), self.num_tokens))


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
    if d.tokenizer is not None and not (Path(d.tokenizer).is_file() and d.tokenizer.endswith((".model", ".json"))):
        raise ValueError(f"data.tokenizer={d.tokenizer}: no such file; name a sentencepiece .model or a tokenizer.json")
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
    for data in {id(x): x for x in (whole, *heldout.values())}.values() if scan else ():
        _check_vocabulary(data, config)
    return DataSets(
        PretrainDataset(train, t.seq_len, t.seed, isolate_documents=d.isolate_documents),
        {n: heldout_windows(x, t.seq_len, isolate_documents=d.isolate_documents) for n, x in heldout.items()},
        {n: _bytes_per_token(x) for n, x in heldout.items()},
        f"{Path(d.path).name}: {train.num_tokens} tokens in {train.num_documents} documents",
    )


def _check_vocabulary(data: IndexedDataset, config: Config) -> None:
    if data.num_tokens <= SCAN_TOKENS and data.sidecar.get("vocab_size", np.inf) > config.model.vocab_size:
        check_vocabulary(data, config.model.vocab_size)


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
            raise ValueError(f"{key}={path}: no such file; name a .jsonl, .json or .parquet file of conversations")
        tokenizer = load_tokenizer(d.tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"data.tokenizer={d.tokenizer} has {tokenizer.vocab_size} tokens, model.vocab_size="
                f"{config.model.vocab_size}; name the tokenizer that the model was made with"
            )
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
        tokenizer = load_tokenizer(config.data.tokenizer)
        if tokenizer.fingerprint != sidecar["tokenizer_sha256"]:
            raise ValueError(
                f"{which} was made with another tokenizer than data.tokenizer={tokenizer.path}; name that one, "
                f"or make it again"
            )


def _open(prefix: str, key: str, reader: str) -> IndexedDataset:
    try:
        return open_indexed(prefix, reader)
    except ValueError as error:
        raise ValueError(f"{key}={prefix}: {error}") from None


def _bytes_per_token(data: IndexedDataset) -> float | None:
    found = data.sidecar.get("text_bytes")
    # the first token of the stream is never predicted
    return found / max(1, data.num_tokens - 1) if isinstance(found, int) and found > 0 else None
