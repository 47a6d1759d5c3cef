"""The data of a run, one training order and any number of named held-out sets; and the checks that all kinds share."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalite.config import Config
from megalite.data.dataset import Samples, check_vocabulary
from megalite.data.indexed import IndexedDataset
from megalite.text.tokenizer import Tokenizer, tokenizer_file

# Reading a whole stream to look for a wrong token id is worth it up to this size; every batch is checked anyway.
SCAN_TOKENS = 200_000_000


@dataclass(frozen=True)
class DataSets:
    """The opened data of a run.

    train: endless; `len(train)` is one epoch. heldout: sets by name. bytes_per_token: of each held-out set, None if its
    text is not known; turns nats per token into bits per byte. fingerprint: what the training data is, compared on
    resume. template: the chat template of instruction data, which is kept with the run.
    """

    train: Samples
    heldout: Mapping[str, Samples]
    bytes_per_token: Mapping[str, float | None]
    fingerprint: str
    template: str | None = None


def check_tokenizer_file(config: Config) -> None:
    """Raises ValueError if data.tokenizer cannot name a tokenizer, or names none."""
    path = config.data.tokenizer
    if path is None:
        return
    if not (Path(path).is_dir() or path.endswith((".model", ".json"))):
        raise ValueError(f"data.tokenizer={path}: name a sentencepiece .model, a tokenizer.json or the folder of one")
    tokenizer_file(path)


def check_size(tokenizer: Tokenizer, config: Config) -> None:
    """Raises ValueError if the model has fewer tokens than the tokenizer."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer={tokenizer.path} has {tokenizer.vocab_size} tokens, model.vocab_size="
            f"{config.model.vocab_size}; name the tokenizer that the model was made with"
        )


def check_token_ids(data: IndexedDataset, config: Config) -> None:
    """Raises ValueError if the data have a token id that the model lacks, unless only a long scan could tell."""
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


def explain(key: str, path: str, join: str = "tools/preprocess_data.py --input FILE FILE") -> None:
    """Raises ValueError if a path that names no data is visibly something else; `join`: a command that joins files."""
    text = (".jsonl", ".json", ".txt", ".parquet", ".gz")
    many = re.search(r"[*?\[]|,|\s", path)
    if many and not Path(path).exists():
        why = f"names several files, and a run reads one; make one of them with {join} and name that"
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
